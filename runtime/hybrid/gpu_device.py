"""The GPU that holds a part of a model: whether there is one that the kernels run on, with memory enough."""

import torch

from dbrx_quant.runtime.kernels.device import free_bytes
from dbrx_quant.runtime.library import _cuda


def splitting_device(device: torch.device, limit: int) -> torch.device:
    """The device that a model's part goes to; "cpu", the default elsewhere, means the current GPU.

    Args:
        device: as it was given.
        limit: bytes that are going to be used there.

    Raises:
        RuntimeError: there is no GPU here, or its kernels do not run.
        ValueError: less is free there.
    """
    chosen = torch.device("cuda") if device.type == "cpu" else device
    _cuda.require_usable(chosen)
    free = free_bytes(chosen)
    if free is not None and limit > free:
        name = torch.cuda.get_device_name(chosen)
        raise ValueError(
            f"gpu memory: {limit / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {chosen} ({name}); give "
            "less, or end what else uses it"
        )
    return chosen
