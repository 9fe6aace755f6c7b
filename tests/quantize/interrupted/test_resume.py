"""A conversion killed at any moment goes on, and ends with the bytes of an uninterrupted one."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from places import TINY
from small_models import save_model, save_random_tokens

from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.files import atomic
from dbrx_quant.runtime.folder.verify import verify

TARGETS = "2.6,3.5"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_random_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", 8, 64, vocabulary=256)


def start(out, tokens):
    """The conversion as a process of its own."""
    command = [
        "-m",
        "dbrx_quant.scripts.cli.main",
        "convert",
        str(TINY),
        str(out),
        "--bpw",
        TARGETS,
        "--quiet",
    ]
    command += ["--calibration", str(tokens), "--max-shard-size", "250kB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def enough(folder, pattern, count):
    return sum(1 for _ in folder.glob(pattern)) >= count


def kill_when(process, condition, delay):
    """SIGKILL `delay` seconds after the condition came true; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.004)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def contents(out):
    """All that a conversion writes, but what tells folders and days apart."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


@pytest.mark.slow  # a minute; the other interruptions are in the default run
def test_a_conversion_killed_at_five_random_moments_ends_with_the_same_bytes(tmp_path, tokens):
    finish(start(tmp_path / "plain", tokens))
    expected = contents(tmp_path / "plain")
    assert sum(name.endswith(".safetensors") for name in expected) > 10

    out, work, choose = tmp_path / "killed", tmp_path / "killed.work", random.Random(20240521)
    linears = 2 * (4 + 16 * 3) + 1
    moments = {
        "measuring": ("measure/linears/*.json", choose.randrange(5, linears // 2)),
        "measuring further": ("measure/linears/*.json", choose.randrange(linears // 2, linears - 5)),
        "quantizing": ("2.6bpw-h6/linears/*.safetensors", choose.randrange(5, 9)),
        "writing shards": ("../killed/2.6bpw/model-*.safetensors", choose.randrange(3, 6)),
        "quantizing the second target": ("3.5bpw-h6/shards/*.json", choose.randrange(3, 6)),
    }
    killed = []
    for moment, (pattern, count) in moments.items():
        parent, _, name = pattern.rpartition("/")
        folder = (work / parent).resolve()
        reached = partial(enough, folder, name, count)
        if kill_when(start(out, tokens), reached, choose.random() / 50):
            killed.append(moment)
        assert (work / "job.json").exists()
    assert killed == list(moments)
    finish(start(out, tokens))
    ours = contents(out)
    assert ours.keys() == expected.keys()
    different = [name for name, data in expected.items() if ours[name] != data]
    assert not different
    assert not [path for path in work.rglob("*") if path.name.endswith(".part")]


def options(model, out, tokens, *targets, **changes):
    usual = {"model": model, "out": out, "targets": targets, "calibration": str(tokens), "quiet": True}
    return ConvertOptions(**usual | changes)


@pytest.fixture
def small(tmp_path):
    return save_model(tmp_path / "model", "dbrx")


class Interrupted(BaseException):
    """Stands for a death of the process: nothing may catch it."""


def count_renames(patch, folder, die_at=None, before=True):
    """Count the renames in a folder that make files whole; die at one, just before or just after it."""
    renames, original = [], os.replace

    def replace(source, target):
        if folder not in Path(target).parents:
            return original(source, target)
        renames.append(Path(target).name)
        if len(renames) == die_at and before:
            raise Interrupted
        original(source, target)
        if len(renames) == die_at:
            raise Interrupted
        return None

    patch.setattr(os, "replace", replace)
    return renames


def test_interruptions_around_renames_end_with_the_same_bytes(small, tmp_path):
    """One conversion that dies again and again, a few new files later each time."""
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 4, 16)
    with pytest.MonkeyPatch.context() as patch:
        renames = count_renames(patch, tmp_path)
        convert(options(small, tmp_path / "plain", tokens, 4.0))
    assert len(renames) > 60
    choose, deaths = random.Random(7), 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            count_renames(patch, tmp_path, choose.randrange(3, 20), choose.random() < 0.5)
            try:
                convert(options(small, tmp_path / "out", tokens, 4.0))
            except Interrupted:
                deaths += 1
                assert deaths < 200, "no progress"
            else:
                break
    assert deaths >= 6
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize("where", ["q_proj.json", "w2.safetensors", "model.safetensors", "strategy.json"])
def test_a_full_disk_is_one_clear_error_and_a_later_run_finishes(where, small, tmp_path, monkeypatch):
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 4, 16)
    (plain,) = convert(options(small, tmp_path / "plain", tokens, 4.0))
    write_parts = atomic.write_parts

    def full(path, parts, wanted=None):
        def failing():
            for part in parts:
                yield part[: len(part) // 2]
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write_parts(path, failing() if Path(path).name.endswith(where) else parts, wanted or 1000)

    with monkeypatch.context() as patch:
        for module in ("dbrx_quant.runtime.files.atomic", "dbrx_quant.runtime.shards.write"):
            if hasattr(sys.modules[module], "write_parts"):
                patch.setattr(f"{module}.write_parts", full)
        with pytest.raises(OSError, match=r"disk full: \d+ bytes required, \d+ free") as caught:
            convert(options(small, tmp_path / "out", tokens, 4.0))
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).endswith(where)
    assert not [path for path in tmp_path.rglob(".*.part")]
    (result,) = convert(options(small, tmp_path / "out", tokens, 4.0, resume="must"))
    assert verify(result.folder).ok
    assert contents(result.folder) == contents(plain.folder)


def test_states_without_room_are_one_clear_error_and_a_later_run_finishes(small, tmp_path, monkeypatch):
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 4, 16)
    with monkeypatch.context() as patch:

        def no_room(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(OSError, match=r"disk full: \d+ bytes required"):
            convert(options(small, tmp_path / "out", tokens, 4.0))
    (result,) = convert(options(small, tmp_path / "out", tokens, 4.0, resume="must"))
    assert verify(result.folder).ok


def test_a_half_written_file_of_a_killed_process_is_removed(small, tmp_path):
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 4, 16)
    chosen = options(small, tmp_path / "out", tokens, 4.0)
    (plain,) = convert(options(small, tmp_path / "plain", tokens, 4.0))
    with pytest.MonkeyPatch.context() as patch:
        count_renames(patch, tmp_path, 30)
        with pytest.raises(Interrupted):
            convert(chosen)
    rests = [
        tmp_path / "out.work" / "measure" / ".states-001.safetensors.4711.part",
        tmp_path / "out.work" / "measure" / "linears" / ".lm_head.json.0a1b2c3d.part",
    ]
    for rest in rests:
        rest.parent.mkdir(parents=True, exist_ok=True)
        rest.write_bytes(b"half")
    (result,) = convert(chosen)
    assert not any(rest.exists() for rest in rests)
    assert contents(result.folder) == contents(plain.folder)


def test_ctrl_c_and_sigterm_are_one_line_each_and_the_work_goes_on(tmp_path, tokens):
    out, work = tmp_path / "out", tmp_path / "out.work"
    for number, code, parent, count in (
        (signal.SIGINT, 130, work / "measure" / "linears", 30),
        (signal.SIGTERM, 75, work / "2.6bpw-h6" / "linears", 12),
    ):
        process = start(out, tokens)
        while not enough(parent, "*.*", count) and process.poll() is None:
            time.sleep(0.004)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == code, stderr
        assert stderr == "dbrx-quant: interrupted; run the same command again to continue\n"
        assert not [path for path in work.rglob(".*.part")]
    finish(start(out, tokens))
    assert all(verify(out / f"{target}bpw").ok for target in TARGETS.split(","))
