"""Atomic writes, bytes that depend on contents alone, fingerprints."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dbrx_quant.runtime.files import atomic


def test_text_and_json_read_back_as_written(tmp_path):
    value = {"b": [1, 2.5, -0.1], "a": {"ü": None, "empty": {}, "list": []}, "rows": [{"x": True}, [1]]}
    atomic.write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["a", "b", "rows"]
    assert ' "b": [1, 2.5, -0.1],' in text.splitlines()
    atomic.write_text(tmp_path / "t.txt", "grün\n")
    assert (tmp_path / "t.txt").read_bytes() == "grün\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["t.txt", "v.json"]


def test_json_refuses_what_would_not_read_back(tmp_path):
    for value, error in (
        ({2: 1}, TypeError),
        ({"a": float("nan")}, ValueError),
        ({"a": {1, 2}}, TypeError),
        ({"a": "\ud800"}, ValueError),
    ):
        with pytest.raises(error, match=r"v\.json"):
            atomic.write_json(tmp_path / "v.json", value)
    assert os.listdir(tmp_path) == []


def test_tensors_read_back_through_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"t.{name}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for dtype, name in atomic.DTYPE_NAMES.items()
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["view"] = torch.arange(24, dtype=torch.int16).view(4, 6).T[1:3]
    atomic.save_tensors(tmp_path / "x.safetensors", tensors, {"b": "1", "a": "ä"})
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].reshape(-1).tolist() == tensor.reshape(-1).tolist(), name
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"a": "ä", "b": "1"}


def test_equal_contents_give_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys, torch; from dbrx_quant.runtime.files.atomic import save_tensors\n"
        "names = sys.argv[2].split(',')\n"
        "save_tensors(sys.argv[1], {n: torch.full((3,), len(n)) for n in names}, {n: n for n in names})"
    )
    written = []
    for i, names in enumerate(("a,bb,ccc,d,e,f", "f,e,d,ccc,bb,a")):
        path = tmp_path / f"{i}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": str(i)}
        subprocess.run([sys.executable, "-c", code, str(path), names], check=True, env=environment)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_bad_tensors_and_metadata_are_refused(tmp_path):
    for tensors, metadata, error in (
        ({"a": torch.zeros(2, dtype=torch.complex64)}, None, ValueError),
        ({"__metadata__": torch.zeros(2)}, None, ValueError),
        ({"a": torch.zeros(2)}, {"rows": 3}, TypeError),
    ):
        with pytest.raises(error):
            atomic.save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file_and_no_leftover(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    atomic.save_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk full: 4\d\d\d bytes required.*x\.safetensors") as caught:
        atomic.save_tensors(path, {"a": torch.zeros(1000)})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_text(path, "new")
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_errors_of_the_system_name_the_file_that_was_to_be_written(call, number, tmp_path, monkeypatch):
    path = tmp_path / "x.json"

    def fail(*arguments, **_):
        named = (
            arguments[:1] if isinstance(arguments[0], Path) else ()
        )  # files are named, descriptors are not
        raise OSError(number, os.strerror(number), *named)

    where = {"fsync": os, "replace": os, "open": Path}[call]
    monkeypatch.setattr(where, call, fail)
    for write in (
        lambda: atomic.write_json(path, {}),
        lambda: atomic.save_tensors(path, {"a": torch.zeros(3)}),
    ):
        with pytest.raises(OSError, match=r"x\.json") as caught:
            write()
        assert caught.value.filename == str(path)
        assert caught.value.errno == number
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_an_error_of_what_is_copied_keeps_the_name_of_its_file(tmp_path):
    def parts():
        yield b"a"
        raise OSError(errno.EIO, "Input/output error", "source.safetensors")

    with pytest.raises(OSError, match="Input/output error") as caught:
        atomic.write_parts(tmp_path / "x", parts(), 2)
    assert caught.value.filename == "source.safetensors"


def test_names_of_the_greatest_length_are_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        atomic.write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_a_place_that_cannot_be_written_is_told_beforehand(tmp_path):
    atomic.check_place(tmp_path / "x.json")
    assert os.listdir(tmp_path) == []
    for place, text in (
        (tmp_path, "a folder"),
        (tmp_path / "no" / "x.json", "there is no folder"),
        (tmp_path / ("n" * 256), "name too long"),
        (Path("/proc/x.json"), "No such file"),
    ):
        with pytest.raises(OSError, match=text) as caught:
            atomic.check_place(place)
        assert caught.value.filename == str(place)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    code = (
        "import os, signal, sys; from dbrx_quant.runtime.files import atomic\n"
        "atomic.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic.write_text(sys.argv[1], 'x' * 1000)"
    )
    (tmp_path / "kept.txt").write_text("kept")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "new.txt")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "new.txt").exists()
    assert len(atomic.remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_fingerprint_follows_contents_and_not_name_or_time(tmp_path):
    small, big = tmp_path / "a.json", tmp_path / "a.safetensors"
    small.write_text("{}")
    first = atomic.fingerprint(small)
    os.utime(small, (1, 1))
    assert atomic.fingerprint(small.rename(tmp_path / "b.json")) == first
    (tmp_path / "b.json").write_text("[]")
    assert atomic.fingerprint(tmp_path / "b.json") != first

    # 9 MB of zeros: both tensors look the same in the samples, only header or touched samples differ
    seen = set()
    for names, first_value, last_value in (("ab", 0, 0), ("ac", 0, 0), ("ab", 1, 0), ("ab", 0, 1)):
        tensors = {name: torch.zeros(1_200_000) for name in names}
        tensors[names[0]][0] = first_value
        tensors[names[1]][-1] = last_value
        atomic.save_tensors(big, tensors)
        seen.add(atomic.fingerprint(big))
    assert len(seen) == 4
    assert all(text.startswith(f"{big.stat().st_size}-") for text in seen)
