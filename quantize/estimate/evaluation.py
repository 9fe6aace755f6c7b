"""Memory and disk that an evaluation takes, checked before it starts."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_quant.calibration.blocks.walk import EXPERT_TOKENS, ROWS_TOKENS
from dbrx_quant.quantize.estimate.memory import BASE_BYTES, DEVICE_BASE_BYTES
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.kernels.device import CPU, available_memory, free_bytes

_LOGITS = 4  # matrices of a window's logits at a time: both models', and what is computed of them
_IN_BLOCK = 2  # values that a token has in a block, per channel of its linears
_IN_EXPERT = 5  # values that a token has in an expert, per channel of its gate's output


@dataclass(frozen=True)
class EvaluationNeeds:
    """Bytes that comparing a quantized model with its original takes.

    Attributes:
        streaming: memory while the original goes through the text, a block at a time.
        scoring: memory while logits are compared, beside the packed weights, which are mapped.
        states: disk for the original's states, in a file without a name.
        kept: disk for states that a later call goes on with, at most.
        cache: disk for log-probabilities.
    """

    streaming: int
    scoring: int
    states: int
    kept: int
    cache: int


def evaluation_needs(architecture: Architecture, windows: int, length: int, cached: bool) -> EvaluationNeeds:
    """What an evaluation takes on windows that the original has not been through.

    Args:
        architecture: of both models.
        windows: how many.
        length: tokens of one.
        cached: whether the original's log-probabilities are kept, and its states until they are all there.
    """
    tokens, hidden = windows * length, architecture.hidden
    head, logits = 4 * hidden * architecture.vocabulary, 4 * length * architecture.vocabulary
    floats = sum(4 * math.prod(spec.shape) for spec in architecture.all_floats())
    states = 4 * tokens * hidden
    return EvaluationNeeds(
        streaming=BASE_BYTES + max(_block_bytes(architecture, length), head + 2 * logits),
        scoring=BASE_BYTES + floats + (0 if cached else head) + _LOGITS * logits,
        states=2 * states,
        kept=2 * states if cached else 0,
        cache=windows * logits if cached else 0,
    )


def _block_bytes(architecture: Architecture, length: int) -> int:
    """A block in float32, or what of it there is beside one of its experts, with what is computed there."""
    most, batch = 0, max(ROWS_TOKENS, length)
    for block in architecture.blocks:
        linears = [spec for stage in block.stages for spec in stage]
        dense = 4 * sum(math.prod(spec.shape) for spec in linears)
        passing = 4 * _IN_BLOCK * batch * sum(sum(spec.shape) for spec in linears)
        loading = 4 * max((math.prod(spec.shape) for spec in linears), default=0)
        most = max(most, dense + max(passing, loading))
        if block.experts:
            expert = 4 * sum(math.prod(spec.shape) for spec in block.experts.linears[0])
            passing = 4 * _IN_EXPERT * EXPERT_TOKENS * block.experts.linears[0][0].shape[1]
            most = max(most, dense + expert + passing)
    return most


def check_evaluation(needs: EvaluationNeeds, device: torch.device, scratch: Path, cache: Path | None) -> None:
    """Raise ValueError if an evaluation is expected to take more memory or disk than is free.

    Args:
        needs: of the evaluation.
        device: where it is computed.
        scratch: the folder of the original's states.
        cache: that of its log-probabilities, if they are kept.
    """
    wanted, there = max(needs.streaming, needs.scoring), available_memory()
    if device == CPU and there is not None and wanted > there:
        raise ValueError(
            f"about {wanted / 1e9:.1f} GB of memory are needed beside the mapped weights, "
            f"{there / 1e9:.1f} GB are available; stop what else runs, or give a shorter --length"
        )
    wanted, free = needs.streaming - BASE_BYTES + DEVICE_BASE_BYTES, free_bytes(device)
    if free is not None and wanted > free:
        raise ValueError(
            f"device {device}: about {wanted / 1e9:.1f} GB of its memory are needed for a block of the "
            f"original, {free / 1e9:.1f} GB are free; stop what else uses it, or give --device cpu"
        )
    together = cache is not None and os.stat(cache).st_dev == os.stat(scratch).st_dev
    kept = needs.kept + needs.cache
    _check_disk(
        scratch, needs.states + (kept if together else 0), "fewer --windows, or another --cache or TMPDIR"
    )
    if cache is not None and not together:
        _check_disk(cache, kept, "fewer --windows, or another --cache")


def _check_disk(folder: Path, wanted: int, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ValueError(
            f"{folder}: about {wanted / 1e9:.1f} GB of disk are needed for the original's states and "
            f"log-probabilities, {free / 1e9:.1f} GB are free; give {remedy}"
        )
