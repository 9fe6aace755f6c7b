"""The CPU in the part of a GPU: linears are tiled and run on the CUDA emulator, but for those that stay.

Wants the fixture `emulated`. Tensors of both sides are on the CPU, so what only devices tell apart is not
seen here (`far_device.py` sees it).
"""

import torch

from dbrx_quant.runtime.kernels import checks, cuda, cuda_tiles, ops
from dbrx_quant.runtime.model import experts, load
from dbrx_quant.runtime.model import linear as linear_module
from dbrx_quant.runtime.model.snapshot import Snapshot


def pretend_gpu(monkeypatch):
    """Have all modules compute on the emulator; experts on the host do so by the CPU's kernels."""
    monkeypatch.setattr(cuda_tiles, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(Snapshot, "all_on_cpu", lambda snapshot: False)
    monkeypatch.setattr(checks, "_TILED_ON", ("cpu", "meta"))
    kernels = ops.kernels(cuda)
    monkeypatch.setattr(linear_module, "linear_op", kernels["linear"])
    monkeypatch.setattr(linear_module, "linears_op", kernels["linears"])
    monkeypatch.setattr(experts, "experts_op", kernels["experts"])
    monkeypatch.setattr(load, "splitting_device", lambda device, limit: torch.device("cpu"))
