"""A work folder belongs to one conversion and one process at a time."""

import json
import os
import subprocess
import sys

import pytest

from dbrx_quant.quantize.measurement import source_facts
from dbrx_quant.quantize.work_folder import JOB_NAME, differences, open_job
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.sealed import seal

FACTS = {
    "model": {"config.json": "2-aa", "model.safetensors": "9-bb"},
    "rows": None,
    "seed": 0,
    "targets": (3.0,),
}


def start(folder, facts=FACTS, resume="auto"):
    with open_job(folder, facts, resume) as resumed:
        return resumed


def put(path, text):
    """A work file, as a run leaves it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    seal(path)


def test_the_first_run_starts_and_the_second_resumes(tmp_path):
    assert start(tmp_path / "new" / "work") is False
    put(tmp_path / "new" / "work" / "result.json", "kept")
    assert start(tmp_path / "new" / "work") is True
    assert (tmp_path / "new" / "work" / "result.json").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"rows": 64}, "rows was None, now 64"),
        (
            {"model": {"config.json": "2-aa", "model.safetensors": "9-cc"}},
            "model.model.safetensors was '9-bb', now '9-cc'",
        ),
        ({"model": {"config.json": "2-aa"}}, "model.model.safetensors was '9-bb', now None"),
        ({"targets": (3.0, 4.0)}, r"targets was [3.0], now [3.0, 4.0]"),
    ],
)
def test_a_changed_fact_is_refused_naming_the_difference(tmp_path, change, told):
    start(tmp_path)
    put(tmp_path / "result.json", "kept")
    with pytest.raises(ValueError, match="holds work of another conversion") as refused:
        start(tmp_path, FACTS | change)
    assert told in str(refused.value)
    assert "--resume never" in str(refused.value)
    assert (tmp_path / "result.json").read_text() == "kept"


def test_every_difference_is_named():
    found = differences({"a": 1, "b": {"c": 2, "d": 3}, "e": [1]}, {"a": 2, "b": {"c": 2}, "e": [1], "f": 0})
    assert found == ["a was 1, now 2", "b.d was 3, now None", "f was None, now 0"]


def test_never_discards_earlier_work(tmp_path):
    start(tmp_path)
    put(tmp_path / "result.json", "old")
    put(tmp_path / "linears" / "x.json", "old")
    (tmp_path / "link").symlink_to(tmp_path.parent)
    assert start(tmp_path, FACTS | {"seed": 1}, "never") is False
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{JOB_NAME}.sha256", JOB_NAME]
    assert start(tmp_path, FACTS | {"seed": 1}) is True


@pytest.mark.parametrize("rest", [(), ("tokens.safetensors", "held-out.safetensors")])
def test_a_start_that_came_to_nothing_does_not_bind_the_next_one(tmp_path, rest):
    start(tmp_path)
    (tmp_path / "measure" / "linears").mkdir(parents=True)
    for name in rest:
        put(tmp_path / name, "of the first start")
    (tmp_path / "measure" / ".states-000.safetensors.1a2b3c4d.part").write_text("half")
    assert start(tmp_path, FACTS | {"seed": 1}) is False
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and JOB_NAME not in path.name]
    with pytest.raises(ValueError, match="no earlier work to resume"):
        start(tmp_path, FACTS, "must")
    assert start(tmp_path, FACTS | {"seed": 1}) is True


@pytest.mark.parametrize("rest", [".job.json.1a2b3c4d.part", ".job.json.sha256", ".lock"])
def test_a_start_that_was_killed_does_not_bind_the_next_one(tmp_path, rest):
    (tmp_path / rest).write_text("half")
    assert start(tmp_path) is False
    assert start(tmp_path) is True
    (tmp_path / JOB_NAME).unlink()
    assert start(tmp_path, FACTS | {"seed": 1}) is False


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:]])
@pytest.mark.parametrize("name", ["a.json", "deep/b.safetensors", "c.safetensors"])
def test_a_damaged_work_file_is_named_and_removed_alone(tmp_path, name, damage, capsys):
    start(tmp_path)
    for other in ("a.json", "deep/b.safetensors", "c.safetensors", "d.json"):
        put(tmp_path / other, "as written")
    (tmp_path / name).write_bytes(damage(b"as written"))
    assert start(tmp_path) is True
    told = capsys.readouterr().err
    assert told == f"notice: {tmp_path / name}: damaged since it was written; it is made anew\n"
    assert not (tmp_path / name).exists()
    assert sum(path.read_text() == "as written" for path in tmp_path.rglob("[abcd].*")) == 3


def test_a_work_file_without_its_checksum_is_made_anew(tmp_path, capsys):
    start(tmp_path)
    put(tmp_path / "a.json", "{}")
    (tmp_path / ".a.json.sha256").unlink()
    assert start(tmp_path) is True
    assert "a.json: there is no checksum of it; it is made anew" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_never_starts_in_an_empty_folder_too(tmp_path):
    assert start(tmp_path, FACTS, "never") is False


def test_must_insists_on_earlier_work(tmp_path):
    with pytest.raises(ValueError, match="no earlier work to resume"):
        start(tmp_path / "work", FACTS, "must")
    start(tmp_path / "work")
    assert start(tmp_path / "work", FACTS, "must") is True


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, resume):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty, and not a work folder of dbrx-quant"):
        start(tmp_path, FACTS, resume)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"facts": {}}', '{"format_version": 1}'])
def test_a_damaged_job_file_is_made_anew_for_the_same_facts_and_refused_for_others(tmp_path, text, capsys):
    start(tmp_path)
    put(tmp_path / "result.json", "kept")
    sound = (tmp_path / JOB_NAME).read_bytes()
    (tmp_path / JOB_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"job\.json: damaged since .*--resume never"):
        start(tmp_path, FACTS | {"seed": 1})
    assert start(tmp_path) is True
    assert f"{tmp_path / JOB_NAME}: damaged" in capsys.readouterr().err
    assert (tmp_path / JOB_NAME).read_bytes() == sound
    (tmp_path / JOB_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"job\.json: missing; .*--resume never"):
        start(tmp_path, FACTS | {"seed": 1})
    assert start(tmp_path) is True
    assert (tmp_path / JOB_NAME).read_bytes() == sound
    (tmp_path / JOB_NAME).write_text(text)
    assert start(tmp_path, FACTS | {"seed": 1}, "never") is False


def test_work_without_any_checksums_is_refused_not_discarded(tmp_path):
    start(tmp_path)
    (tmp_path / "a.json").write_text("of a version that wrote none")
    (tmp_path / f".{JOB_NAME}.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"job\.json: there is no checksum of it; .*--resume never"):
        start(tmp_path)
    assert (tmp_path / "a.json").exists()


def test_work_of_another_version_is_refused(tmp_path):
    start(tmp_path)
    job = json.loads((tmp_path / JOB_NAME).read_text())
    put(tmp_path / JOB_NAME, json.dumps(job | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        start(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "measure", "deep/b.safetensors"])
def test_links_and_pipes_in_a_work_folder_are_refused_and_not_followed(tmp_path, name):
    work, victim = tmp_path / "work", tmp_path / "victim"
    start(work)
    (work / "deep").mkdir()
    victim.mkdir()
    (victim / ".x.1a.part").write_text("precious")
    for make in (lambda path: path.symlink_to(victim), os.mkfifo):
        make(work / name)
        with pytest.raises(ValueError, match=f"{name}: a link or no regular file"):
            start(work)
        (work / name).unlink()
    assert (victim / ".x.1a.part").read_text() == "precious"


def holder(folder, then):
    """A process that takes hold of a work folder, says so, and then does as told."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom dbrx_quant.quantize.work_folder import open_job\n"
        f"with open_job(Path(sys.argv[1]), {FACTS!r}, 'auto'):\n    print('held', flush=True)\n    {then}\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=pipe, stdout=pipe, text=True, cwd=folder
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_process_is_refused_while_the_first_works(tmp_path, resume):
    with holder(tmp_path, "sys.stdin.read()") as process:
        put(tmp_path / "result.json", "kept")
        with pytest.raises(ValueError, match="another process is working in this folder"):
            start(tmp_path, FACTS, resume)
        assert (tmp_path / "result.json").exists()
        process.stdin.close()
    assert start(tmp_path) is True


def test_a_killed_process_leaves_no_lock(tmp_path):
    with holder(tmp_path, "os._exit(9)  # no clean-up, as after a kill") as process:
        assert process.wait(60) == 9
    assert start(tmp_path) is True


def test_a_source_is_known_by_its_config_and_all_its_shards(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for i in range(3):
        (tmp_path / f"model-{i}.safetensors").write_bytes(bytes(100) + bytes([i]))
    (tmp_path / "README.md").write_text("not part of it")
    before = source_facts(tmp_path)
    assert len(before) == 4
    assert source_facts(tmp_path) == before
    (tmp_path / "README.md").write_text("changed")
    assert source_facts(tmp_path) == before
    (tmp_path / "model-1.safetensors").write_bytes(bytes(99) + b"\1\1")
    after = source_facts(tmp_path)
    assert differences(before, after) == [
        f"model-1.safetensors was {before['model-1.safetensors']!r}, now {after['model-1.safetensors']!r}"
    ]
