"""The device that dense arithmetic runs on: found and tried out before the work, and the way there and back.

What grows with tokens stays on the host, in files; it goes over a batch at a time. On the way to a GPU it is
copied into pinned memory first and the host goes on while it travels, so the next batch is gathered while the
GPU works on this one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")
EXACT = 1e-5  # relative error that float32 products stay far below, and rounded ones far above


def find_device(name: str) -> torch.device:
    """The device that torch calls by a name (cpu, cuda, cuda:1, ...), if it computes what is needed.

    Raises:
        ValueError: there is no such device here, it lacks float64, or float32 products are rounded there.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", _next_gpu())
        if device.type == "cpu":
            return CPU
        error = _trial_error(device)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError, ModuleNotFoundError) as refused:
        why = str(refused).strip().splitlines() or [type(refused).__name__]
        raise ValueError(
            f"device {name}: torch cannot compute there ({why[0][:200]}); give --device cpu, or cuda where "
            "there is a GPU and a torch built for it"
        ) from refused
    if not error < EXACT:
        raise ValueError(
            f"device {name}: float32 products are off by {error:.1e} there, expected below {EXACT:.0e}; is "
            "TF32 forced on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE? Else give --device cpu"
        )
    return device


def _next_gpu() -> int:
    """The GPU of this process: of several that torchrun has started on a machine, each takes the next one."""
    worker = os.environ.get("LOCAL_RANK", "")
    if not worker.isdecimal():
        return torch.cuda.current_device()
    return int(worker) % torch.cuda.device_count()


def device_name(device: torch.device) -> str:
    """What computes there, with which last bits may change: the kind of device, and a GPU's model."""
    if device.type != "cuda":
        return device.type
    return f"{device.type} ({torch.cuda.get_device_name(device)})"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a GPU; None: of another device torch does not know."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def available_memory() -> int | None:
    """Bytes of main memory that programs could take now; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return None


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the host to a GPU it travels while the host goes on."""
    if device.type == "cuda" and tensor.device == CPU:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def download(tensor: Tensor) -> Tensor:
    """A tensor on the host; from a GPU it comes into pinned memory, and has arrived."""
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.cpu()


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the `with` block sums over an index are made in the same order at every run, on GPUs too.

    The setting is torch's own and holds for the whole process.
    """
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _trial_error(device: torch.device) -> float:
    """Relative error of a float32 product on the device; what else a conversion needs is tried as well."""
    x = torch.randn(192, 320, generator=torch.Generator().manual_seed(0))
    there = x.to(device)
    truth = there.double() @ there.double().T
    torch.linalg.cholesky_ex(truth)
    return float(((there @ there.T).double() - truth).norm() / truth.norm())
