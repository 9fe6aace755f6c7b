"""What a checkpoint weighs on disk and in memory, and the bits per weight that a size allows."""

import math
from pathlib import Path

from dbrx_quant.quantize.budget.allocate import HEAD_OVERHEAD_BITS
from dbrx_quant.quantize.budget.groups import UNIT, coarsest_groups
from dbrx_quant.quantize.measurement import HEAD
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.exl2.format import SUFFIXES, WIDTHS, padded_columns, storage_bits, uniform_groups
from dbrx_quant.runtime.families.facts import Architecture, LinearSpec
from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.sizes import cache_bytes

HEADER_BYTES = 68  # of a tensor in a shard's header, its name aside


def source_architecture(folder: Path) -> Architecture:
    """What a source folder holds, its headers checked.

    Raises:
        CheckpointError: it is incomplete or unknown, or has channels that cannot be quantized.
    """
    architecture = open_source(folder).architecture
    check_channels(architecture)
    return architecture


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
                f"{spec.name}: {spec.shape[0]} input channels are not a multiple of {UNIT}; the quantizer "
                f"gives bits to {UNIT} of them at a time"
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


def bpw_for_size(options: ConvertOptions, size: int) -> float:
    """The bits per weight at which the checkpoint takes `size` bytes.

    Raises:
        ValueError: even the fewest bits take more.
    """
    return _bpw(source_architecture(options.model), options.head_bits, size, f"{size / 1e9:.3g} GB")


def bpw_for_vram(options: ConvertOptions, vram: int, context: int) -> float:
    """The bits per weight at which model and a half-precision cache of `context` tokens fit in `vram` bytes.

    Five per cent are left for activations and fragmentation.

    Raises:
        ValueError: the cache alone, or the fewest bits, take more.
    """
    architecture = source_architecture(options.model)
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
            f"{what} is not enough: at {low:.3f} bits per weight, the fewest, the weights take "
            f"{needed / 1e9:.3g} GB"
        )
    return math.floor(min(bpw, high) * 1e4) / 1e4
