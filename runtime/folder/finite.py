"""Values that are not finite in the 16-bit tensors of a checkpoint: one of them makes every output NaN."""

import numpy as np
import torch

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.format import TENSORS
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents

_CHUNK_BYTES = 64 << 20


def check_finite(contents: Contents) -> None:
    """Refuse NaN and infinity in norms, embedding, routers and all else that is not quantized.

    Scales and biases of linears were checked with the linears. It costs 0.1 s a gigabyte: least and largest
    value in one pass, in which a NaN wins.

    Raises:
        CheckpointError: names the first such value.
    """
    for name in contents.names:
        linear, _, suffix = name.rpartition(".")
        if suffix not in TENSORS or not contents.checkpoint.is_quantized(linear):
            fault = finite_fault(contents.checkpoint, name)
            if fault:
                raise CheckpointError(f"{contents.checkpoint.info(name).file}: {name}: {fault}")


def finite_fault(checkpoint: Checkpoint, name: str) -> str | None:
    """What is wrong with the values of a tensor; None where all are finite."""
    flat = checkpoint.load(name).reshape(-1)
    step = _CHUNK_BYTES // flat.element_size()
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        if not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
            at = int((~torch.isfinite(part)).nonzero()[0])
            place = list(map(int, np.unravel_index(begin + at, checkpoint.info(name).shape)))
            return f"element {place} is {part[at].item()}, expected finite values"
    return None
