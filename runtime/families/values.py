"""Whether the values of an original can be quantized at all, found out before the work and not during it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.finite import first_not_finite
from dbrx_quant.runtime.families.facts import Architecture, find_source, to_half
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.output.progress import bar

_PIECE = 8 << 20  # values


def check_values(architecture: Architecture, checkpoint: Checkpoint, quiet: bool) -> None:
    """Read all weights once: a small part of the time of a conversion, which would find the last fault last.

    Raises:
        CheckpointError: a value is NaN or infinite; or one to be stored in 16 bits is beyond float16.
    """
    linears = {find_source(checkpoint, spec).tensor for spec in architecture.linears()}
    halves = [kept.name for kept in architecture.all_floats()]
    halves += [f"{spec.name}.bias" for spec in architecture.linears() if spec.bias]
    with bar(len(linears) + len(halves), "check values", quiet) as progress:
        for name in halves:
            for piece in _pieces(checkpoint, name):
                to_half(piece, f"{checkpoint.info(name).file}: {name}")
            progress.step(name)
        for name in sorted(linears):
            if found := first_not_finite(checkpoint, name):
                where = f"{checkpoint.info(name).file}: {checkpoint.info(name).name}"
                raise CheckpointError(f"{where}: {found}; the original is damaged, fetch it again")
            checkpoint.release(name)
            progress.step(name)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor in runs of rows."""
    shape = checkpoint.info(name).shape
    step = max(1, _PIECE // max(1, torch.Size(shape[1:]).numel()))
    for begin in range(0, shape[0], step):
        yield checkpoint.load(name, (begin, min(begin + step, shape[0])))
