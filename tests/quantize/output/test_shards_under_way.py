"""Shards that come while others are still to be made: damaged, begun otherwise, in an earlier one's place."""

import os
from pathlib import Path

import pytest
from small_models import save_model, save_random_tokens
from tiny_output import cut, delete, flip

from dbrx_quant.quantize import conversion, second_pass
from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.solve.stage import StageSolver
from dbrx_quant.runtime.folder.verify import verify

LIMIT = 30_000


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    return {
        "model": save_model(folder / "model", "dbrx"),
        "targets": (4.0,),
        "calibration": str(save_random_tokens(folder / "tokens.safetensors", 16, 8)),
        "held_out": str(save_random_tokens(folder / "others.safetensors", 2, 8, seed=1)),
        "max_shard_bytes": LIMIT,
        "quiet": True,
    }


def run(asked, out, **changes):
    (result,) = convert(ConvertOptions(out=out, **asked | changes))
    return contents(result.folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(asked, tmp_path_factory):
    return run(asked, tmp_path_factory.mktemp("plain") / "out")


class Killed(BaseException):
    """Stands for a death of the process: nothing may catch it."""


def killed(asked, out, module, function, calls=0, **changes):
    """Have a conversion die at a call of a function."""
    original, left = getattr(module, function), [calls]

    def die(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed):
            run(asked, out, **changes)


MOMENTS = {  # in the middle of the second block; after the last linear; before the small files
    "quantizing": (StageSolver, "_solve", 14),
    "comparing": (second_pass, "distance"),
    "writing": (conversion, "write_configs"),
}


@pytest.mark.parametrize("damage", [flip, cut, delete])
@pytest.mark.parametrize("moment", MOMENTS)
def test_damaged_shards_are_named_and_made_anew_with_the_same_bytes(
    moment, damage, asked, plain, tmp_path, capsys
):
    out = tmp_path / "out"
    killed(asked, out, *MOMENTS[moment])
    assert not verify(out).ok
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) >= 3
    for path in (shards[1], shards[-1]):
        damage(path)
    assert run(asked, out) == plain
    told = capsys.readouterr().err
    for path in (shards[1], shards[-1]):
        assert f"notice: {path}: not as it was written; its linears are made anew\n" in told
    assert not [path for name in ("shards", "linears") for path in (tmp_path / "out.work").rglob(name)]


def test_all_shards_can_be_lost(asked, plain, tmp_path):
    killed(asked, tmp_path / "out", *MOMENTS["comparing"])
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert run(asked, tmp_path / "out") == plain


def test_another_shard_size_in_the_middle_is_refused_before_more_work(asked, plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(asked, out, *MOMENTS["quantizing"])
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "load_rows", None)
        with pytest.raises(
            ValueError, match=f"--max-shard-size of {LIMIT} bytes, now it is {LIMIT + 1}; give"
        ):
            run(asked, out, max_shard_bytes=LIMIT + 1)
    assert contents(out) == before
    assert run(asked, out) == plain
    assert run(asked, out, max_shard_bytes=LIMIT + 1) == plain, "a finished result keeps its files"


def test_an_earlier_result_is_gone_and_never_mixed_with_the_new_one_whenever_the_process_dies(
    asked, plain, tmp_path, capsys
):
    """Each run dies at a later new file of the folder than the one before it, counted from its own start."""
    out, original = tmp_path / "out", os.replace
    run(asked, out, targets=(5.0,), max_shard_bytes=10 * LIMIT)
    assert verify(out).ok
    capsys.readouterr()
    deaths, sound, left = 0, 0, [0]

    def dying(source, target):
        original(source, target)
        left[0] -= out in Path(target).parents
        if left[0] < 0:
            raise Killed

    while True:
        left[0] = deaths
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                run(asked, out)
            except Killed:
                deaths += 1
            else:
                break
        assert (f"notice: {out}: holds an earlier result" in capsys.readouterr().err) == (deaths == 1)
        assert deaths < 50, "no progress"
        if verify(out).ok:  # only files that say where it comes from are missing
            assert contents(out).items() <= plain.items()
            sound += 1
    assert deaths - sound > 5
    assert contents(out) == plain
