"""The GPU that holds a part of a model: whether there is one that the kernels run on, with memory enough."""

import torch

from dbrx_quant.runtime.kernels.device import free_bytes
from dbrx_quant.runtime.library import _cuda


def splitting_device(device: str | torch.device, limit: int) -> torch.device:
    """The device that a model's part goes to; "cpu", the default elsewhere, means the current GPU.

    Args:
        device: as it was given.
        limit: bytes that are going to be used there.

    Raises:
        RuntimeError: there is no GPU here, or its kernels do not run.
        ValueError: less is free there.
    """
    chosen = torch.device(device)
    if chosen.type == "cpu":
        chosen = torch.device("cuda")
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise RuntimeError("gpu memory: torch sees no CUDA GPU here; leave it out to run on the CPU")
    if (reason := _cuda.why_unavailable()) is not None:
        raise RuntimeError(f"gpu memory: needs the CUDA kernels: {reason}")
    free = free_bytes(chosen)
    if free is not None and limit > free:
        name = torch.cuda.get_device_name(chosen)
        raise ValueError(
            f"gpu memory: {limit / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {chosen} ({name}); give "
            "less, or end what else uses it"
        )
    return chosen
