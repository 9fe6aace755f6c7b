"""What a conversion will take, told before it starts: sizes, reachable bits, memory and time."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.unseen import UNSEEN_TOKENS
from dbrx_quant.quantize.allocate import HEAD_OVERHEAD_BITS
from dbrx_quant.quantize.measurement import HEAD
from dbrx_quant.quantize.operations import machine_speed, measuring_operations, quantizing_operations
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.recipe import UNIT, coarsest_groups
from dbrx_quant.quantize.repair import NO_REPAIR, REPAIRED
from dbrx_quant.runtime.config import load_config
from dbrx_quant.runtime.errors import CheckpointError
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.facts import Architecture, LinearSpec, check_dense_source
from dbrx_quant.runtime.format import SUFFIXES, WIDTHS, padded_columns, storage_bits, uniform_groups

BASE_BYTES = 900_000_000  # Python, torch and transformers
HEADER_BYTES = 68  # of a tensor in a shard's header, its name aside
DEFAULT_TOKENS = (128, 2048)


@dataclass(frozen=True)
class Target:
    """One target and what its checkpoint will weigh."""

    bpw: float
    total_bytes: int
    reachable: bool


@dataclass(frozen=True)
class Plan:
    """What a conversion will take.

    Attributes:
        family: of the model.
        weights: of the decoder's linears.
        lowest_bpw: least bits per weight that its shapes allow.
        highest_bpw: most.
        targets: the targets and their sizes.
        peak_bytes: estimate of the most memory at a time.
        disk_bytes: estimate of the work folder at its largest, the output aside.
        measure_seconds: estimate, from a short trial of this machine.
        quantize_seconds: estimate for each target.
    """

    family: str
    weights: int
    lowest_bpw: float
    highest_bpw: float
    targets: tuple[Target, ...]
    peak_bytes: int
    disk_bytes: int
    measure_seconds: float
    quantize_seconds: float

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        return asdict(self)


def plan(options: ConvertOptions) -> Plan:
    """What converting with these options will take; reads headers only.

    Raises:
        CheckpointError: the source is incomplete or unknown.
    """
    architecture = _architecture(options.model)
    low, high = shape_range(architecture)
    rows, length = _token_shape(options)
    tokens = rows * length
    speed, repair = machine_speed(), options.repair != NO_REPAIR
    targets = tuple(
        Target(t, total_bytes(architecture, t, options.head_bits), low <= t <= high) for t in options.targets
    )
    return Plan(
        architecture.family,
        decoder_weights(architecture),
        low,
        high,
        targets,
        peak_bytes(architecture, tokens),
        states_bytes(architecture, tokens) + max((t.total_bytes for t in targets), default=0),
        measuring_operations(architecture, tokens, options.effort) / speed,
        quantizing_operations(architecture, tokens, options.effort, repair, options.refit) / speed,
    )


def _architecture(folder: Path) -> Architecture:
    architecture = describe(load_config(folder))
    check_channels(architecture)
    check_dense_source(architecture, architecture.open(folder))
    return architecture


def _token_shape(options: ConvertOptions) -> tuple[int, int]:
    if Path(options.calibration).suffix == ".safetensors":
        from dbrx_quant.calibration.data import load_saved

        shape = load_saved(Path(options.calibration), options.rows, options.length).input_ids.shape
        return shape[0], shape[1]
    return options.rows or DEFAULT_TOKENS[0], options.length or DEFAULT_TOKENS[1]


def _decoder(architecture: Architecture) -> list[LinearSpec]:
    return [spec for spec in architecture.linears() if spec.name != HEAD]


def decoder_weights(architecture: Architecture) -> int:
    """Number of weights of the decoder's linears."""
    return sum(math.prod(spec.shape) for spec in _decoder(architecture))


def shape_range(architecture: Architecture) -> tuple[float, float]:
    """Least and most bits per weight that the model's shapes allow, overhead included."""
    fewest = most = 0
    for spec in _decoder(architecture):
        k, stored = spec.shape[0], (spec.shape[0], padded_columns(spec.shape[1]))
        fewest += storage_bits(coarsest_groups(k, WIDTHS[-1]), stored, spec.bias)
        most += storage_bits(uniform_groups(k, WIDTHS[0], UNIT), stored, spec.bias)
    weights = decoder_weights(architecture)
    return fewest / weights, most / weights


def check_channels(architecture: Architecture) -> None:
    """Raise CheckpointError naming the first linear whose input channels cannot be quantized."""
    for spec in architecture.linears():
        if spec.shape[0] % UNIT:
            raise CheckpointError(
                f"{spec.name}: {spec.shape[0]} input channels are no multiple of {UNIT}; the quantizer gives "
                f"bits to {UNIT} of them at a time"
            )


def fixed_bytes(architecture: Architecture, head_bits: int) -> int:
    """Bytes of all but the decoder's linears: head, embedding, norms, routers, and the shards' headers."""
    head = (head_bits + HEAD_OVERHEAD_BITS) * math.prod(architecture.head.shape) / 8
    floats = sum(2 * math.prod(spec.shape) for spec in architecture.all_floats())
    names = [f"{spec.name}.{suffix}" for spec in architecture.linears() for suffix in SUFFIXES]
    names += [f"{spec.name}.bias" for spec in architecture.linears() if spec.bias]
    names += [spec.name for spec in architecture.all_floats()]
    return int(head + floats) + sum(HEADER_BYTES + len(name) for name in names)


def total_bytes(architecture: Architecture, bpw: float, head_bits: int) -> int:
    """Size of a checkpoint's shards."""
    return int(bpw * decoder_weights(architecture) / 8) + fixed_bytes(architecture, head_bits)


def states_bytes(architecture: Architecture, tokens: int) -> int:
    """The hidden states and gradients before every block that are on disk while it is measured."""
    return 2 * 4 * tokens * architecture.hidden * (len(architecture.blocks) + 2)


def cache_bytes(architecture: Architecture, context: int) -> int:
    """Keys and values of so many tokens in half precision."""
    first = architecture.blocks[0]
    cached = sum(spec.shape[1] for stage in first.stages for spec in stage if spec.role in ("k", "v"))
    return 2 * cached * context * len(architecture.blocks)


def bpw_for_size(options: ConvertOptions, size: int) -> float:
    """The bits per weight at which the checkpoint takes `size` bytes.

    Raises:
        ValueError: even the fewest bits take more.
    """
    return _bpw(_architecture(options.model), options.head_bits, size, f"{size / 1e9:.3g} GB")


def bpw_for_vram(options: ConvertOptions, vram: int, context: int) -> float:
    """The bits per weight at which model and a half-precision cache of `context` tokens fit in `vram` bytes.

    Five per cent are left for activations and fragmentation.

    Raises:
        ValueError: the cache alone, or the fewest bits, take more.
    """
    architecture = _architecture(options.model)
    cache = cache_bytes(architecture, context)
    return _bpw(
        architecture,
        options.head_bits,
        int(0.95 * vram) - cache,
        f"{vram / 1e9:.3g} GB with a cache of {cache / 1e9:.3g} GB for {context} tokens",
    )


def _bpw(architecture: Architecture, head_bits: int, size: int, what: str) -> float:
    bpw = 8 * (size - fixed_bytes(architecture, head_bits)) / decoder_weights(architecture)
    low, high = shape_range(architecture)
    if bpw < low:
        needed = total_bytes(architecture, low, head_bits)
        raise ValueError(
            f"{what} is too little: at {low:.3f} bits per weight, the fewest, the weights take "
            f"{needed / 1e9:.3g} GB"
        )
    return math.floor(min(bpw, high) * 1e4) / 1e4


def peak_bytes(architecture: Architecture, tokens: int) -> int:
    """Estimate of the most memory that a conversion takes at a time.

    One block's attention (or whole dense block) in float32, or one expert, with the moments and the factor of
    the linear being solved; experts' inputs and their gradients for all tokens.
    """
    most = 0
    for block in architecture.blocks[:1] + architecture.blocks[-1:]:
        dense = 4 * sum(math.prod(s.shape) for stage in block.stages for s in stage)
        moments = sum(8 * stage[0].shape[0] ** 2 for stage in block.stages)
        moments += 4 * min(tokens, UNSEEN_TOKENS) * sum(stage[0].shape[0] for stage in block.stages)
        most = max(most, 2 * dense + moments + max(_solving(s) for stage in block.stages for s in stage))
        if block.experts:
            expert = 4 * sum(math.prod(s.shape) for s in block.experts.linears[0])
            held = sum(12 * s.shape[0] ** 2 for s in block.experts.linears[0][1:])
            held += 4 * min(tokens, UNSEEN_TOKENS) * sum(s.shape[0] for s in block.experts.linears[0][1:])
            streams = 3 * 4 * tokens * architecture.hidden
            solving = max(_solving(s) for s in block.experts.linears[0])
            most = max(most, dense + expert + held + streams + solving)
    return BASE_BYTES + max(most, _solving(architecture.head) + 4 * math.prod(architecture.head.shape))


def _solving(spec: LinearSpec) -> int:
    k, n = spec.shape
    repairing = 12 * k * k + 24 * k * n if spec.role in REPAIRED else 0  # held-out moments, factor; changes
    return max(repairing, 12 * k * k + 19 * k * n)  # Hessian, ordered copy, factor; weights, targets, results


def check_memory(architecture: Architecture, tokens: int, limit: int | None) -> None:
    """Raise ValueError if a conversion is expected to take more memory than `limit` bytes."""
    wanted = peak_bytes(architecture, tokens)
    if limit is not None and wanted > limit:
        raise ValueError(
            f"about {wanted / 1e9:.2f} GB of memory are needed at a time, --max-memory allows "
            f"{limit / 1e9:.2f} GB; fewer calibration tokens need less"
        )


def check_disk(
    architecture: Architecture,
    tokens: int,
    work: Path,
    out: Path | None,
    results: Sequence[int] = (),
    measured: bool = False,
) -> None:
    """Raise ValueError if the disk has no room for a conversion, before hours have gone into it.

    Args:
        architecture: of the model.
        tokens: of the calibration.
        work: the work folder; what it holds from earlier on counts as room.
        out: where results go; None: there are none.
        results: bytes of each.
        measured: whether the measurement is there already.
    """
    states = 4 * tokens * architecture.hidden * 6 if measured else states_bytes(architecture, tokens)
    wanted, there = states + max(results, default=0), _bytes_in(work)
    folder = _existing(work)
    free = shutil.disk_usage(folder).free + there
    if wanted > free:
        raise ValueError(
            f"{work}: about {wanted / 1e9:.2f} GB of disk are needed for states and linears, "
            f"{free / 1e9:.2f} GB are free; fewer calibration tokens (--rows, --length) need less, or put "
            "--work-dir on another disk"
        )
    if out is None:
        return
    place, total = _existing(out), sum(results)
    if os.stat(place).st_dev == os.stat(folder).st_dev:
        free -= max(results, default=0)  # states are gone by then, but not the linears
    else:
        free = shutil.disk_usage(place).free
    if total > free + _bytes_in(out):
        raise ValueError(
            f"{out}: the results take {total / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "ask for fewer or smaller ones, or write to another disk"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
