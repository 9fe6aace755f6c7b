"""A process that reads a mapped file which was cut says which file, and exits; no signal kills it."""

import signal
import subprocess
import sys

import pytest

from dbrx_quant.runtime.library import _native

READS = """
import ctypes, mmap, os, sys
library, path, before = sys.argv[1:]
if before:
    exec(before)
ctypes.CDLL(library).dbrxq_explain_bus_errors()
with open(path, "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
os.truncate(path, 100)
print(mapped[5000])
"""


def run(path, before=""):
    path.write_bytes(bytes(10_000))
    command = [sys.executable, "-c", READS, str(_native.LIBRARY.find()), str(path), before]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_file_is_named(tmp_path):
    done = run(tmp_path / "my model.safetensors")
    assert done.returncode == 1
    assert done.stderr.startswith(f"dbrx-quant: error: {tmp_path}/my model.safetensors: was cut, ")


@pytest.mark.parametrize("before", ["import faulthandler; faulthandler.enable()"])
def test_a_handler_that_was_there_is_called(tmp_path, before):
    done = run(tmp_path / "x", before)
    assert done.returncode == -signal.SIGBUS
    assert "/x: was cut, " in done.stderr
    assert "Fatal Python error: Bus error" in done.stderr
