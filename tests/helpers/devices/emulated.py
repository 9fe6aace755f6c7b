"""What the tests of the emulated CUDA kernels share: shapes, and the backend's calls on tensors by suffix."""

import ctypes
import os
import re

import torch

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import checks, cuda, cuda_tiles, ops
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.model import experts
from dbrx_quant.runtime.model import linear as linear_module

SANITIZED = (
    os.environ.get("DBRXQ_EMULATOR") == "sanitized"
)  # the same tests, in a process of test_emulator.py
WIDTHS = (8, 6, 5, 4, 3, 2)
SHAPES = {
    **oracle.SHAPES,
    "more than a block's columns": ([(5, 128), (3, 416), (2, 48)], 288),
    "rows for several splits": ([(6, 32), (4, 480), (3, 512), (2, 528)], 64),
}
TOKENS = (1, 3, 8, 9, 16, 17, 65)  # both sides of every switch between kernels and tiles
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def dequantize(tensors, out_features=None):
    n = tensors["q_weight"].shape[1]
    return cuda.dequantize(Stored.of(tensors), n if out_features is None else out_features)


def linear(x, tensors, out_features=None):
    n = tensors["q_weight"].shape[1]
    width = n if out_features is None else out_features
    return cuda.linear(x, Stored.of(tensors), tensors.get("bias"), width)


def assert_as_accurate_as_torch(ours, exact, plain, what=""):
    """Our rounding error may be at most twice that of plain torch with the same dtypes, in rms."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    limit = 2 * oracle.rms(plain.double() - exact) + 1e-30
    assert oracle.rms(ours.double() - exact) <= limit, what


def play_gpu(monkeypatch):
    """The CPU in the part of a GPU: modules and native steps take its tensors to the emulated kernels."""
    monkeypatch.setattr(cuda_tiles, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(checks, "_TILED_ON", ("cpu", "meta"))
    kernels = ops.kernels(cuda)
    monkeypatch.setattr(linear_module, "linear_op", kernels["linear"])
    monkeypatch.setattr(linear_module, "linears_op", kernels["linears"])
    monkeypatch.setattr(experts, "experts_op", kernels["experts"])


def launches(library):
    """The launches since the last call, each as the type of its arguments."""
    text = ctypes.create_string_buffer(1 << 25)  # many tests may have launched since
    count = library.dbrxq_emulator_launches(text, len(text))
    found = re.findall(r"with Parameters = \{(?:[^,\n]*::)?(\w+)[,}]", text.value.decode())
    assert len(found) == count, text.value.decode()[:500]
    return found
