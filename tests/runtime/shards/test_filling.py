"""A result that is being made is on disk once: full shards take their linears along, and none is lost."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from tiny_output import cut, delete, flip, make_source, random_linear

from dbrx_quant.runtime.exl2.format import read_groups, uniform_groups
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.sealed import remove_damaged
from dbrx_quant.runtime.files.watched import ChangedError
from dbrx_quant.runtime.shards import write as writing
from dbrx_quant.runtime.shards.filling import Facts, FillingShards, check_begun, is_begun
from dbrx_quant.runtime.shards.linear_files import LinearFiles
from dbrx_quant.runtime.shards.write import write_shards

SMALL = 20_000  # bytes a shard: several linears in one; embedding and head need shards of their own
LIMITS = (3_000, SMALL, 8_000_000_000)  # a file for each big tensor; several linears; one file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = make_source(folder / "source")
    architecture = describe(load_config(source))
    linears = {spec.name: random_linear(spec, seed) for seed, spec in enumerate(architecture.linears())}
    groups = {
        name: read_groups(one["q_groups"], one["q_weight"].shape[0], one["q_invperm"].shape[0])
        for name, one in linears.items()
    }
    files = LinearFiles(folder / "linears")
    for spec in architecture.linears():
        files.write(spec, linears[spec.name], None, facts(spec))
    return SimpleNamespace(
        architecture=architecture,
        checkpoint=architecture.open(source),
        specs=list(architecture.linears()),
        linears=linears,
        groups=groups,
        files=files,
    )


def facts(spec):
    return {"loss": repr(spec.shape[0] / 7), "energy": repr(float(spec.shape[1]))}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Limit → the files of `write_shards`, which gets all linears at once."""
    found = {}
    for limit in LIMITS:
        out = tmp_path_factory.mktemp("expected") / "out"
        write_shards(out, model.architecture, model.checkpoint, model.files.folder, limit)
        found[limit] = contents(out)
    return found


def begin(model, folder, limit=SMALL, groups=None, replaced=()):
    """The shards of a result, begun or resumed."""
    work, out = folder / "work", folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    return FillingShards(
        work, out, model.architecture, model.checkpoint, groups or model.groups, limit, replaced
    )


def go_on(model, shards, specs=None, done=None):
    """Finish the linears that are not finished, one after another; adds each to `done`."""
    for spec in shards.unfinished(specs or model.specs):
        shards.write(spec, model.linears[spec.name], None, facts(spec))
        if done is not None:
            done.append(spec)
        shards.fill()


def put_together(model, shards, done=None):
    go_on(model, shards, done=done)
    shards.fill()
    shards.finish()


def some_shard(folder, at=2):
    return sorted((folder / "out").glob("*.safetensors"))[at]


def test_linears_that_others_work_on_stay_files_though_their_shard_is_full(model, tmp_path):
    shards = begin(model, tmp_path)
    for spec in model.specs:
        shards.write(spec, model.linears[spec.name], None, facts(spec))
    last = model.specs[3]
    shards.fill(under_way={last.name})
    assert shards.path(last.name).exists()
    assert last.name not in shards.facts
    assert not shards.path(model.specs[-1].name).exists()
    shards.fill()
    assert not shards.path(last.name).exists()
    assert last.name in shards.facts


@pytest.mark.parametrize("limit", LIMITS)
def test_shards_that_fill_one_by_one_are_those_of_all_linears_at_once(limit, model, expected, tmp_path):
    shards = begin(model, tmp_path, limit)
    put_together(model, shards)
    assert contents(tmp_path / "out") == expected[limit]
    assert shards.facts == {
        spec.name: Facts(float(facts(spec)["loss"]), float(facts(spec)["energy"])) for spec in model.specs
    }
    shards.forget()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_linear_leaves_the_work_folder_with_the_shard_that_it_fills(model, tmp_path):
    shards = begin(model, tmp_path)
    for spec in model.specs:
        go_on(model, shards, [spec])
        waiting = {path.stem for path in (tmp_path / "work" / "linears").glob("*.safetensors")}
        written = {
            name.rpartition(".")[0]
            for path in (tmp_path / "out").glob("*.safetensors")
            for name in load_file(path)
        }
        assert not waiting & written, "the head aside, a linear is in one place"
        assert sum(path.stat().st_size for path in (tmp_path / "work" / "linears").iterdir()) < 2 * SMALL
        assert shards.unfinished(model.specs) == model.specs[model.specs.index(spec) + 1 :]
        if spec == model.specs[-2]:
            break
    assert len(written) > 10


def test_a_linear_of_several_shards_stays_until_the_last_of_them(model, tmp_path):
    head, kept = model.specs[-1], tmp_path / "work" / "linears" / "lm_head.safetensors"
    shards, seen = begin(model, tmp_path, 3_000), []
    go_on(model, shards, model.specs[:-1])
    before, original = contents(tmp_path / "out").keys(), writing.write_parts

    def look(path, *arguments):
        original(path, *arguments)
        seen.append(kept.exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_parts", look)
        go_on(model, shards, [head])
    assert len(seen) == len(contents(tmp_path / "out").keys() - before) > 1
    assert all(seen)
    assert not kept.exists()


@pytest.mark.parametrize("limit", LIMITS)
def test_a_weight_is_the_same_in_its_file_and_in_shards(limit, model, tmp_path):
    shards = begin(model, tmp_path, limit)
    for spec in model.specs:
        go_on(model, shards, [spec])
        assert shards.weight(spec).equal(model.files.weight(spec)), spec.name
    for again in (shards, begin(model, tmp_path, limit)):
        for spec in model.specs:
            assert again.weight(spec).equal(model.files.weight(spec)), spec.name
        again.check(model.specs)


class Killed(BaseException):
    """Stands for a death of the process: nothing may catch it."""


def count_changes(patch, die_at=None, before=True):
    """Count the operations that change which files there are; die at one, just before or just after it."""
    changes = []

    def counted(original):
        def operation(*arguments, **named):
            changes.append(original.__name__)
            if len(changes) == die_at and before:
                raise Killed
            result = original(*arguments, **named)
            if len(changes) == die_at:
                raise Killed
            return result

        return operation

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "write_text")):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return changes


@pytest.mark.parametrize("limit", LIMITS[:2])
def test_a_death_at_any_moment_costs_no_finished_linear_and_changes_no_byte(
    limit, model, expected, tmp_path, capsys
):
    with pytest.MonkeyPatch.context() as patch:
        changes = count_changes(patch)
        put_together(model, begin(model, tmp_path / "whole", limit))
    assert len(changes) > 4 * len(model.specs)
    for at in range(1, len(changes) + 1, 3 if limit == SMALL else 11):
        folder, done = tmp_path / f"{at}", []
        with pytest.MonkeyPatch.context() as patch:
            count_changes(patch, at, before=at % 2 == 1)
            with pytest.raises(Killed):
                put_together(model, begin(model, folder, limit), done)
        for lost, _ in remove_damaged(folder / "work"):  # as whoever opens a work folder does
            assert lost.stem not in [spec.name for spec in done]
        shards = begin(model, folder, limit)
        assert not shards.unfinished(done)
        put_together(model, shards)
        assert contents(folder / "out") == expected[limit]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "0123abc"])
def test_a_death_while_a_note_is_sealed_loses_nothing(part, model, expected, tmp_path):
    with pytest.MonkeyPatch.context() as patch:

        def die(path, text, **named):
            if path.parent.name == "shards":
                path.write_bytes(part.encode())
                raise Killed
            return original(path, text, **named)

        original = Path.write_text
        patch.setattr(Path, "write_text", die)
        for _ in range(2):
            with pytest.raises(Killed):
                go_on(model, begin(model, tmp_path), model.specs[:8])
            assert len(list(remove_damaged(tmp_path / "work"))) == 1
    put_together(model, begin(model, tmp_path))
    assert contents(tmp_path / "out") == expected[SMALL]


def half_done(model, folder, limit=SMALL):
    """All linears but the last three: several shards are there, and files for the next one."""
    shards = begin(model, folder, limit)
    go_on(model, shards, model.specs[:-3])
    assert len(contents(folder / "out")) > 3
    assert list((folder / "work" / "linears").glob("*.safetensors"))
    return shards


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_the_linears_of_a_damaged_shard_are_named_and_made_anew(damage, model, expected, tmp_path, capsys):
    half_done(model, tmp_path)
    path = some_shard(tmp_path)
    inside = {name.rpartition(".")[0] for name in load_file(path) if name.endswith("q_weight")}
    damage(path)
    shards = begin(model, tmp_path)
    assert capsys.readouterr().err == f"notice: {path}: not as it was written; its linears are made anew\n"
    assert {spec.name for spec in shards.unfinished(model.specs[:-3])} == inside
    put_together(model, shards)
    assert contents(tmp_path / "out") == expected[SMALL]


@pytest.mark.parametrize("damaged", ["shard", "note"])
def test_linears_that_come_out_otherwise_the_second_time_are_refused(damaged, model, tmp_path):
    half_done(model, tmp_path)
    path = some_shard(tmp_path)
    flip(path if damaged == "shard" else tmp_path / "work" / "shards" / f"{path.stem}.json")
    assert len(list(remove_damaged(tmp_path / "work"))) == (damaged == "note")
    shards = begin(model, tmp_path)
    spec, *others = shards.unfinished(model.specs)
    go_on(model, shards, [other for other in others if other in model.specs[:-3]])
    tensors = model.linears[spec.name]
    other = {**tensors, "q_scale": tensors["q_scale"] ^ 1}
    shards.write(spec, other, None, facts(spec))
    for attempt in (shards, None):
        with pytest.raises(
            CheckpointError, match=rf"{path.stem}\.json: was damaged, and comes out otherwise"
        ):
            (attempt or begin(model, tmp_path)).fill()
    with pytest.raises(CheckpointError, match="has not been written"):
        shards.finish()


def test_a_lost_note_costs_its_linears_alone(model, expected, tmp_path):
    half_done(model, tmp_path)
    cut(tmp_path / "work" / "shards" / f"{some_shard(tmp_path).stem}.json")
    assert len(list(remove_damaged(tmp_path / "work"))) == 1
    shards = begin(model, tmp_path)
    assert 0 < len(shards.unfinished(model.specs[:-3])) < 8
    put_together(model, shards)
    assert contents(tmp_path / "out") == expected[SMALL]


def test_a_shard_that_changes_while_others_are_made_is_an_error_and_found_at_the_next_start(
    model, expected, tmp_path, capsys
):
    shards = half_done(model, tmp_path)
    path = some_shard(tmp_path)
    spec = next(s for s in model.specs if any(name.startswith(f"{s.name}.") for name in load_file(path)))
    flip(path)
    for use in (lambda: shards.weight(spec), lambda: shards.check([spec])):
        with pytest.raises(CheckpointError, match=rf"{path.name}: not as .*; run the same command") as caught:
            use()
        assert not isinstance(caught.value, ChangedError), "that one speaks of the original"
    go_on(model, shards)
    with pytest.raises(CheckpointError, match=path.name):
        shards.finish()
    assert not (tmp_path / "out" / "checksums.json").exists()
    put_together(model, begin(model, tmp_path))
    assert contents(tmp_path / "out") == expected[SMALL]
    assert "are made anew" in capsys.readouterr().err


def test_a_damaged_file_of_a_linear_reaches_no_shard(model, expected, tmp_path):
    shards = half_done(model, tmp_path)
    before = contents(tmp_path / "out")
    path = next((tmp_path / "work" / "linears").glob("*.safetensors"))
    flip(path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged since"):
        go_on(model, shards)
    assert contents(tmp_path / "out") == before
    assert [lost for lost, _ in remove_damaged(tmp_path / "work")] == [path]
    put_together(model, begin(model, tmp_path))
    assert contents(tmp_path / "out") == expected[SMALL]


def test_a_linear_of_other_groups_than_planned_reaches_no_shard(model, tmp_path):
    groups = {**model.groups, model.specs[2].name: uniform_groups(model.specs[2].shape[0], 5, 32)}
    with pytest.raises(CheckpointError, match=rf"{model.specs[2].name}.* planned as"):
        go_on(model, begin(model, tmp_path, groups=groups))


def test_another_limit_is_refused_once_a_shard_is_there(model, tmp_path):
    go_on(model, begin(model, tmp_path, 10**9), model.specs[:8])
    assert not is_begun(tmp_path / "work"), "the only shard has room left"
    go_on(model, begin(model, tmp_path, SMALL + 1), model.specs[:9])
    assert is_begun(tmp_path / "work")
    told = rf"--max-shard-size of {SMALL + 1} bytes, now it is {SMALL}; give the earlier"
    for start in (check_begun, lambda work, limit: begin(model, tmp_path, limit)):
        with pytest.raises(ValueError, match=told):
            start(tmp_path / "work", SMALL)
        start(tmp_path / "work", SMALL + 1)


@pytest.mark.parametrize("bits", [2, 3])
def test_notes_of_other_shards_are_refused(bits, model, tmp_path):
    """Of another number of shards, with 2 bits; of other sizes, with 3."""
    half_done(model, tmp_path)
    groups = {
        name: uniform_groups(sum(group.rows for group in old), bits, 32) for name, old in model.groups.items()
    }
    with pytest.raises(CheckpointError, match=r"json: of another shard than those .*--resume never"):
        begin(model, tmp_path, groups=groups)


def test_a_full_disk_is_noticed_at_the_start_and_before_each_shard(model, expected, tmp_path, monkeypatch):
    total = sum(len(data) for name, data in expected[SMALL].items() if name.endswith(".safetensors"))
    free = [total]
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    shards = half_done(model, tmp_path)
    free[0] = 1_000
    before = contents(tmp_path / "out")
    with pytest.raises(OSError, match="1000 are free") as caught:
        go_on(model, shards)
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path / "out") == before
    free[0] = total - sum(map(len, before.values()))
    put_together(model, begin(model, tmp_path))
    free[0] = total - 1
    with pytest.raises(OSError, match=f"{total - 1} are free"):
        begin(model, tmp_path / "other")
    for name, data in before.items():  # of an earlier result, which goes
        (tmp_path / "other" / "out" / name).write_bytes(data)
    begin(model, tmp_path / "other")


def test_an_earlier_result_goes_when_the_first_shard_comes_and_not_before(model, expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, data in expected[3_000].items():
        (out / name).write_bytes(data)
    for name in ("config.json", "README.md", ".model.safetensors.0badcafe.part"):
        (out / name).write_text("of an earlier result")
    shards = begin(model, tmp_path, replaced=["config.json", "strategy.json"])
    assert contents(out).keys() == expected[3_000].keys() | {"config.json", "README.md"}
    go_on(model, shards, model.specs[:8])
    assert contents(out).keys() < expected[SMALL].keys() | {"README.md"}
    assert "checksums.json" not in contents(out)
    kept = contents(out)
    (out / "model.safetensors").write_bytes(b"")
    shards = begin(model, tmp_path, replaced=["config.json"])
    go_on(model, shards)
    assert contents(out).items() > kept.items()
    assert not (out / "model.safetensors").exists()
    shards.finish()
    assert contents(out) == {**expected[SMALL], "README.md": b"of an earlier result"}


def test_what_is_not_complete_is_not_finished(model, tmp_path):
    shards = half_done(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model-\d+-of-\d+\.safetensors: has not been written"):
        shards.finish()
