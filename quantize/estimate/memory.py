"""Memory and disk that a conversion takes, checked before hours go into it."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_quant.calibration.blocks.head import TOKENS_AT_ONCE
from dbrx_quant.calibration.blocks.walk import EXPERT_TOKENS, ROWS_TOKENS
from dbrx_quant.calibration.statistics.held_out import HELD_OUT_TOKENS
from dbrx_quant.quantize.first_pass import backward_stride
from dbrx_quant.runtime.families.facts import Architecture, LinearSpec
from dbrx_quant.runtime.kernels.device import free_bytes

BASE_BYTES = 900_000_000  # Python, torch and transformers
DEVICE_BASE_BYTES = 300_000_000  # workspaces of libraries; what a process takes at its start is not free then
_FRAGMENTS = 1.1  # what an allocator takes for what is asked of it
_IN_ATTENTION = 2  # values that a token has in attention and its gradients, per channel of its linears
_SCORES = 4  # matrices of attention scores at a time, gradients included
_IN_EXPERT = 8  # values that a token has in an expert and its gradients, per channel of its gate


@dataclass(frozen=True)
class DeviceNeeds:
    """What of a conversion, beside the model's shapes, decides how much is on a device at a time.

    Attributes:
        length: tokens of a row.
        heads: of attention.
        measured: held-out tokens, whose inputs are kept while an expert is measured.
        predicted: tokens that an allocation is predicted on; an expert's go through it at once.
        refit: whether scales are fitted once more.
    """

    length: int
    heads: int
    measured: int
    predicted: int
    refit: bool


def states_bytes(architecture: Architecture, tokens: int) -> int:
    """What is on disk while it is measured: states before every block, gradients of two, a block's own."""
    values = 2 * (len(architecture.blocks) + 1) + 2 * 2 / backward_stride(tokens)
    return math.ceil((values + 4 + 4 + 2) * tokens * architecture.hidden)


def quantizing_bytes(architecture: Architecture, tokens: int) -> int:
    """States that are on disk while it is quantized: both models' before and after a block and inside it.

    While a block is at work, its stream, its experts' inputs and what the stream misses are there in 32 bits,
    and the shares of its experts; before that, the original's stream is, at three points.
    """
    active = max((block.experts.active for block in architecture.blocks if block.experts), default=0)
    return (2 * 6 + max(4 * 3 + 4, 4 + 4 + 4 + 2 * active)) * tokens * architecture.hidden


def exchange_bytes(architecture: Architecture, tokens: int) -> int:
    """What several workers give each other at a time: inputs of a block's experts, misses, and shares."""
    active = max((block.experts.active for block in architecture.blocks if block.experts), default=0)
    return (4 + 2 + 2 * active) * tokens * architecture.hidden


def peak_bytes(architecture: Architecture, tokens: int) -> int:
    """Estimate of the peak memory of a conversion.

    One block's attention (or whole dense block) in float32, or one expert, with the moments and the factor of
    the linear being solved; for all tokens, experts' inputs, and the stream or the inputs' gradients. The
    last are files without a name: where memory is short, the system writes them out.
    """
    most = 0
    for block in architecture.blocks[:1] + architecture.blocks[-1:]:
        dense = 4 * sum(math.prod(s.shape) for stage in block.stages for s in stage)
        moments = sum(8 * stage[0].shape[0] ** 2 for stage in block.stages)
        moments += 4 * min(tokens, HELD_OUT_TOKENS) * sum(stage[0].shape[0] for stage in block.stages)
        most = max(most, 2 * dense + moments + max(_solving(s) for stage in block.stages for s in stage))
        if block.experts:
            expert = 4 * sum(math.prod(s.shape) for s in block.experts.linears[0])
            held = sum(12 * s.shape[0] ** 2 for s in block.experts.linears[0][1:])
            held += 4 * min(tokens, HELD_OUT_TOKENS) * sum(s.shape[0] for s in block.experts.linears[0][1:])
            values = tokens * architecture.hidden
            solving = max(_solving(s) for s in block.experts.linears[0])
            most = max(most, dense + expert + max(held + 2 * 4 * values + solving, 4 * 4 * values))
    return BASE_BYTES + max(most, _solving(architecture.head))


def _solving(spec: LinearSpec) -> int:
    k, n = spec.shape
    repairing = 12 * k * k + 24 * k * n if spec.writes_stream else 0  # selection moments, factor; changes
    solving = 12 * k * k + 10 * k * n  # Hessian, ordered copy, factor; weights, ordered ones, codes, packed
    return max(repairing, solving)


def device_bytes(architecture: Architecture, needs: DeviceNeeds) -> int:
    """Estimate of the peak memory on a device that computes: of what grows with tokens, a batch or span.

    One block's attention (or whole dense block) in float32 is there, or beside it one expert, in float32 and
    as its products take it, with the moments and the factor of the linear being solved; or the head.
    """
    most, batch = 0, max(ROWS_TOKENS, needs.length)
    held = min(needs.measured, HELD_OUT_TOKENS)
    for block in architecture.blocks[:1] + architecture.blocks[-1:]:
        linears = [spec for stage in block.stages for spec in stage]
        dense = 4 * sum(math.prod(spec.shape) for spec in linears)
        moments = sum(
            (8 + 4) * stage[0].shape[0] ** 2 + 4 * held * stage[0].shape[0] for stage in block.stages
        )
        passing = 4 * batch * _IN_ATTENTION * sum(sum(spec.shape) for spec in linears)
        passing += 4 * _SCORES * batch * needs.length * needs.heads
        largest = max(_solving_there(stage, needs.refit) for stage in block.stages)
        most = max(most, dense + moments + max(dense, passing, largest))
        if block.experts:
            gate, up, down = block.experts.linears[0]
            weights = 6 * sum(math.prod(spec.shape) for spec in (gate, up, down))
            moments = sum(12 * spec.shape[0] ** 2 + 4 * held * spec.shape[0] for spec in (gate, down))
            active, count = block.experts.active, block.experts.count
            at_once = max(EXPERT_TOKENS, min(needs.predicted, 2 * needs.predicted * active // count))
            passing = 4 * at_once * _IN_EXPERT * sum(gate.shape)
            solving = max(_solving_there((gate, up), needs.refit), _solving_there((down,), needs.refit))
            most = max(most, dense + weights + moments + max(passing, solving))
    k, n = architecture.head.shape
    scoring = max(4 * k * n + 20 * n * TOKENS_AT_ONCE, 8 * k * n + 16 * n * needs.length)
    head = 12 * k * k + max(_solving_there((architecture.head,), needs.refit), scoring)
    return DEVICE_BASE_BYTES + math.ceil(_FRAGMENTS * max(most, head))


def _solving_there(stage: Sequence[LinearSpec], refit: bool) -> int:
    """Of linears with the same inputs: Hessian, ordered copy, factor; weights, ordered ones, targets."""
    k, n = stage[0].shape[0], max(spec.shape[1] for spec in stage)
    weights = sum(4 * k * spec.shape[1] for spec in stage)
    repairing = 12 * k * k + 24 * k * n if stage[0].writes_stream else 0
    fitting = 16 * k * k + 12 * k * n if refit else 0  # cross moments; quantized weights, their errors
    return weights + max(repairing, 12 * k * k + 4 * k * n, fitting) + 8 * 256 * n


def check_device_memory(device: torch.device, architecture: Architecture, needs: DeviceNeeds) -> None:
    """Raise ValueError if a conversion is expected to take more memory of a GPU than is free there."""
    free, needed = free_bytes(device), device_bytes(architecture, needs)
    if free is not None and needed > free:
        raise ValueError(
            f"device {device}: about {needed / 1e9:.2f} GB of its memory are needed at the peak, "
            f"{free / 1e9:.2f} GB are free; stop what else uses it, calibrate on shorter rows (--length), or "
            "give --device cpu"
        )


def check_memory(architecture: Architecture, tokens: int, limit: int | None) -> None:
    """Raise ValueError if a conversion is expected to take more memory than `limit` bytes."""
    needed = peak_bytes(architecture, tokens)
    if limit is not None and needed > limit:
        raise ValueError(
            f"about {needed / 1e9:.2f} GB of memory are needed at the peak, --max-memory allows "
            f"{limit / 1e9:.2f} GB; fewer calibration tokens need less"
        )


def waiting_bytes(architecture: Architecture, result: int, max_shard_bytes: int) -> int:
    """Finished linears that wait on disk for their shard to be full, and are still there while it is written.

    Args:
        architecture: of the model.
        result: bytes of all shards.
        max_shard_bytes: limit of one.
    """
    stages = [stage for block in architecture.blocks for stage in block.stages]
    stages += [expert for block in architecture.blocks if block.experts for expert in block.experts.linears]
    largest = max(sum(math.prod(spec.shape) for spec in stage) for stage in [*stages, [architecture.head]])
    return min(result, max_shard_bytes + largest)  # a weight takes a byte at most, about


def work_bytes(
    architecture: Architecture, tokens: int, results: Sequence[int], max_shard_bytes: int, measured: bool
) -> int:
    """The work folder at its largest: states while it measures, or states and waiting linears later.

    Args:
        architecture: of the model.
        tokens: of the calibration.
        results: bytes of each.
        max_shard_bytes: limit of a shard.
        measured: whether the measurement is there already.
    """
    waiting = max((waiting_bytes(architecture, result, max_shard_bytes) for result in results), default=0)
    measuring = 0 if measured else states_bytes(architecture, tokens)
    return max(measuring, quantizing_bytes(architecture, tokens) + waiting if results else 0)


def check_disk(
    architecture: Architecture,
    tokens: int,
    work: Path,
    out: Path | None,
    results: Sequence[int] = (),
    max_shard_bytes: int = 0,
    measured: bool = False,
    several: bool = False,
) -> None:
    """Raise ValueError if the disk has no room for a conversion, before hours have gone into it.

    Args:
        architecture: of the model.
        tokens: of the calibration.
        work: the work folder; what it holds from earlier on counts as room.
        out: where results go; None: there are none.
        results: bytes of each.
        max_shard_bytes: limit of a shard of the results.
        measured: whether the measurement is there already.
        several: whether several workers give each other files.
    """
    needed, there = work_bytes(architecture, tokens, results, max_shard_bytes, measured), _bytes_in(work)
    needed += exchange_bytes(architecture, tokens) if several else 0
    folder = _existing(work)
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise ValueError(
            f"{work}: about {needed / 1e9:.2f} GB of disk are needed for states and linears, "
            f"{free / 1e9:.2f} GB are free; fewer calibration tokens (--rows, --length) need less, or put "
            "--work-dir on another disk"
        )
    if out is None:
        return
    place, total = _existing(out), sum(results)
    if os.stat(place).st_dev == os.stat(folder).st_dev:
        free -= work_bytes(architecture, tokens, results, max_shard_bytes, measured=True)
    else:
        free = shutil.disk_usage(place).free
    free += _bytes_in(out)
    if total > free:
        raise ValueError(
            f"{out}: the results take {total / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free beside the "
            "work folder; ask for fewer or smaller ones, or write to another disk"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
