"""Atomic writes, bytes that depend on contents alone, fingerprints."""

import errno
import json
import os
import subprocess
import sys

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
    for value, error in (({2: 1}, TypeError), ({"a": float("nan")}, ValueError), ({"a": {1, 2}}, TypeError)):
        with pytest.raises(error):
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
