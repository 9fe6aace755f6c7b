"""What a conversion will take, estimated before it starts: sizes, reachable bits, memory and time."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.text.sources import kind_of
from dbrx_quant.calibration.text.tokens import HELD_OUT_EVERY
from dbrx_quant.quantize.estimate.memory import DeviceNeeds, device_bytes, peak_bytes, work_bytes
from dbrx_quant.quantize.estimate.sizes import decoder_weights, shape_range, source_architecture, total_bytes
from dbrx_quant.quantize.estimate.time import machine_speed, measuring_operations, quantizing_operations
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.rows import HELD_OUT_ROWS, default_shape
from dbrx_quant.quantize.solve.repair import NO_REPAIR
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.kernels.device import CPU, find_device


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
        peak_bytes: estimate of the peak memory.
        disk_bytes: estimate of the work folder at its largest, the output aside.
        measure_seconds: estimate, from a short trial of this machine; None where another device than the CPU
            computes, whose pace nobody has measured.
        quantize_seconds: estimate for each target, likewise.
        device_bytes: estimate of the peak memory of that other device.
    """

    family: str
    weights: int
    lowest_bpw: float
    highest_bpw: float
    targets: tuple[Target, ...]
    peak_bytes: int
    disk_bytes: int
    measure_seconds: float | None
    quantize_seconds: float | None
    device_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        return asdict(self)


def plan(options: ConvertOptions) -> Plan:
    """What converting with these options will take; reads headers only.

    Raises:
        CheckpointError: the source is incomplete or unknown.
        ValueError: there is no such device.
    """
    here = find_device(options.device) == CPU
    architecture = source_architecture(options.model)
    low, high = shape_range(architecture)
    rows, length = _token_shape(options, architecture)
    tokens = rows * length
    effort, repair = options.effort, options.repair != NO_REPAIR
    speed = machine_speed() if here else None
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
        work_bytes(
            architecture, tokens, [t.total_bytes for t in targets], options.max_shard_bytes, measured=False
        ),
        speed and measuring_operations(architecture, tokens, effort) / speed,
        speed and quantizing_operations(architecture, tokens, effort, repair, options.refit) / speed,
        None if here else device_bytes(architecture, _device_needs(options, rows, length)),
    )


def _device_needs(options: ConvertOptions, rows: int, length: int) -> DeviceNeeds:
    held_out = (options.held_out_rows or HELD_OUT_ROWS) if options.held_out else rows // HELD_OUT_EVERY
    heads: int = load_config(options.model).num_attention_heads
    return DeviceNeeds(length, heads, held_out * length, (held_out or rows) * length, options.refit)


def _token_shape(options: ConvertOptions, architecture: Architecture) -> tuple[int, int]:
    if kind_of(Path(options.calibration)) == ".safetensors":
        from dbrx_quant.calibration.text.tokens import load_saved

        shape = load_saved(Path(options.calibration), options.rows, options.length).input_ids.shape
        return shape[0], shape[1]
    rows, length = default_shape(architecture)
    return options.rows or rows, options.length or length
