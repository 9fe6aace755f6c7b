"""What a quantized checkpoint takes on disk, counted from its headers, and its cache in memory."""

from dataclasses import dataclass

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.families.facts import Architecture, LinearSpec, find_source


@dataclass(frozen=True)
class StoredBits:
    """Bits on disk and number of weights of the model.

    Attributes:
        decoder_bits: all stored bits of the blocks' linears, every overhead included.
        decoder_weights: their weights, padding not counted.
        head_bits: stored bits of the head.
        head_weights: its weights.
        total_bytes: bytes of all tensors, the 16-bit ones included.
    """

    decoder_bits: int
    decoder_weights: int
    head_bits: int
    head_weights: int
    total_bytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight of the blocks' linears: the figure that a target names."""
        return self.decoder_bits / self.decoder_weights

    @property
    def head_bpw(self) -> float:
        """Bits per weight of the head."""
        return self.head_bits / self.head_weights


def linear_bits(checkpoint: Checkpoint, spec: LinearSpec) -> int:
    """Bits that a linear takes on disk, in EXL2 form or as a float tensor.

    Raises:
        CheckpointError: one of its tensors is missing.
    """
    if not checkpoint.is_quantized(spec.name):
        source = find_source(checkpoint, spec)
        info = checkpoint.info(source.tensor)
        begin, end = source.rows or (0, info.shape[0])
        return 8 * info.nbytes * (end - begin) // info.shape[0]
    names = [f"{spec.name}.{suffix}" for suffix in SUFFIXES]
    if f"{spec.name}.bias" in checkpoint:
        names.append(f"{spec.name}.bias")
    return 8 * sum(checkpoint.info(name).nbytes for name in names)


def stored_bits(checkpoint: Checkpoint, architecture: Architecture) -> StoredBits:
    """The bits of a whole checkpoint.

    Raises:
        CheckpointError: a linear is missing.
    """
    decoder = [spec for block in architecture.blocks for spec in block.linears()]
    return StoredBits(
        decoder_bits=sum(linear_bits(checkpoint, spec) for spec in decoder),
        decoder_weights=sum(spec.shape[0] * spec.shape[1] for spec in decoder),
        head_bits=linear_bits(checkpoint, architecture.head),
        head_weights=architecture.head.shape[0] * architecture.head.shape[1],
        total_bytes=sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
    )


def cache_bytes(architecture: Architecture, context: int, item_bytes: int = 2) -> int:
    """Bytes of the keys and values of `context` tokens; in half precision by default."""
    first = architecture.blocks[0]
    cached = sum(spec.shape[1] for stage in first.stages for spec in stage if spec.role in ("k", "v"))
    return item_bytes * cached * context * len(architecture.blocks)
