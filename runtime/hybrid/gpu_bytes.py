"""What a model takes in a GPU's memory: linears in the layout of the kernels, 16-bit tensors, workspace.

Counted as torch's allocator gives memory out: in pieces of 512 bytes, from 10 MiB on of 2 MiB.
"""

import math
from dataclasses import dataclass

from dbrx_quant.runtime.exl2.format import SUFFIXES, padded_columns
from dbrx_quant.runtime.families.facts import Architecture, ExpertsSpec, LinearSpec
from dbrx_quant.runtime.folder.contents import Contents

_PIECE, _LARGE, _LARGE_PIECE = 512, 10 << 20, 2 << 20
_UNIT = 32  # rows that the kernels take together
_TILE = 64  # rows of an expert's inputs that they take together
_PASS_TOKENS = 2048  # of the experts' kernels
_STATES = 12  # a token's states, as wide as the residual stream, that a layer of transformers holds at most
_RESERVE = 192 << 20  # partial sums of the kernels, torch's own workspaces, pieces that nothing fits into


def allocated(count: int) -> int:
    """Bytes that a tensor of `count` bytes takes."""
    piece = _PIECE if count < _LARGE else _LARGE_PIECE
    return -(-count // piece) * piece


def linear_bytes(contents: Contents, spec: LinearSpec, item_bytes: int) -> int:
    """Bytes of a linear and of what the kernels read beside its stored tensors.

    Args:
        contents: the folder's.
        spec: the linear.
        item_bytes: of an element of tensors that are not quantized.
    """
    k, n = spec.shape
    if not contents.is_quantized(spec):
        return allocated(item_bytes * (k * n + (n if spec.bias else 0)))
    columns = padded_columns(n)
    sizes = [contents.checkpoint.info(f"{spec.name}.{suffix}").nbytes for suffix in SUFFIXES]
    sizes[SUFFIXES.index("q_weight")] += 4 * columns * (k % _UNIT != 0)
    units = sum(-(-group.rows // _UNIT) for group in contents.groups[spec.name])
    sizes += [4 * units, 4 * _UNIT * units]  # scales and permutation of the units
    sizes += [2 * columns] if spec.bias else []
    return sum(map(allocated, sizes))


@dataclass(frozen=True)
class Batch:
    """What is computed at once, at most.

    Attributes:
        tokens: of a prompt.
        logits: tokens of which logits are made.
        item_bytes: of an activation.
    """

    tokens: int
    logits: int
    item_bytes: int


def workspace_bytes(architecture: Architecture, batch: Batch) -> int:
    """Bytes for activations and for what the kernels write in between, from above."""
    states = _STATES * batch.tokens * architecture.hidden * batch.item_bytes
    inner = max((s.shape[1] for b in architecture.blocks for stage in b.stages for s in stage), default=0)
    states += 3 * batch.tokens * inner * batch.item_bytes
    logits = batch.logits * architecture.vocabulary * (batch.item_bytes + 8)
    experts = max((_experts_bytes(b.experts, batch) for b in architecture.blocks if b.experts), default=0)
    return _RESERVE + states + logits + experts


def _experts_bytes(experts: ExpertsSpec, batch: Batch) -> int:
    hidden, inner = experts.linears[0][0].shape
    slots = min(batch.tokens, _PASS_TOKENS) * experts.active
    rows = slots + min(experts.count, slots) * (_TILE - 1) + _TILE
    parts = 2 if batch.item_bytes == 4 else 1  # a float32 goes into two halves
    widths = [math.ceil(width / _UNIT) * _UNIT for width in (hidden, inner)]
    return rows * (parts * 2 * (2 * widths[0] + widths[1]) + 4 * (hidden + inner + 4))
