"""The native CUDA library, whether it runs on a GPU, and its statuses as exceptions.

It is built where a CUDA compiler is found. It loads on machines without a GPU: only its calls fail there.
"""

import functools
from pathlib import Path

import torch

from dbrx_quant.runtime.library import _abi, _gpus
from dbrx_quant.runtime.library._shared_library import SharedLibrary

LIBRARY = SharedLibrary(
    "libdbrxq_cuda.so",
    "dbrx-quant's CUDA library",
    "a CUDA compiler (nvcc)",
    "dbrxq_cuda_abi_version",
    _abi.CUDA_FUNCTIONS,
)

library = LIBRARY.get
load = LIBRARY.load


def use(path: Path) -> None:
    """Use the library at `path` instead of the installed one: for benchmarks and tests.

    Raises:
        RuntimeError: it does not load, or is another library.
    """
    LIBRARY.use(path)
    _why_not_on.cache_clear()


def build() -> _gpus.Build:
    """What the library was built with and for.

    Raises:
        RuntimeError: there is none.
    """
    native = library()
    return _gpus.Build.parse(native.dbrxq_cuda_runtime_version(), native.dbrxq_cuda_targets().decode())


def why_unavailable(device: torch.device | None = None) -> str | None:
    """The reason why the library cannot be used, or None when it can.

    Args:
        device: where; a GPU's driver and compute capability are looked at once. None: anywhere.
    """
    reason = LIBRARY.why_unavailable()
    if reason is not None or device is None or device.type != "cuda":
        return reason
    return _why_not_on(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not_on(index: int) -> str | None:
    gpus = _gpus.find_gpus()
    if index >= len(gpus):
        return f"there is no GPU {index}, torch finds {len(gpus)}"
    return _gpus.why_not_on(gpus[index], build(), _gpus.driver_version()) or _probe(gpus[index])


def _probe(gpu: _gpus.Gpu) -> str | None:
    """What the driver says to the library's code, where the rules expect that it runs."""
    status = library().dbrxq_cuda_probe(gpu.index)
    if status == 0:
        return None
    text = library().dbrxq_cuda_status_text(status).decode()
    return f"{gpu.name} (cuda:{gpu.index}) does not load the CUDA library's code ({build()}): {text}"


def require_usable(device: torch.device) -> None:
    """Refuse a GPU on which the kernels cannot run, before anything is loaded onto it; other devices pass.

    Raises:
        RuntimeError: there is no such GPU, or the library cannot be used there; the message says what to do.
    """
    if device.type != "cuda":
        return
    reason = why_unavailable(device) if torch.cuda.is_available() else _gpus.why_no_gpu()
    if reason is not None:
        raise RuntimeError(f"device {device}: {reason}")


def check(status: int, what: str) -> None:
    """Raise for a status other than 0.

    Raises:
        RuntimeError: the device refused or failed.
        ValueError: an argument is not what dbrxq.h asks for.
    """
    if status == 0:
        return
    text = f"{what}: {library().dbrxq_cuda_status_text(status).decode()}"
    raise RuntimeError(text) if status >= _abi.CUDA_ERRORS else ValueError(text)
