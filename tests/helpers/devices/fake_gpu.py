"""The CPU in the part of a GPU beside the host: linears run on the CUDA emulator, but for those that stay.

Wants the fixture `emulated`. Tensors of both sides are on the CPU, so what only devices tell apart is not
seen here (`far_device.py` sees it).
"""

import torch
from emulated import play_gpu

from dbrx_quant.runtime.model import load


def pretend_gpu(monkeypatch):
    """Have all modules compute on the emulator; experts on the host do so by the CPU's kernels."""
    play_gpu(monkeypatch)
    monkeypatch.setattr(load, "splitting_device", lambda device, limit: torch.device("cpu"))
