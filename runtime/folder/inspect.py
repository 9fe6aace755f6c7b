"""What a quantized folder spends its bits on: by matrix, by block and role, by expert.

Bits per weight are all stored bits of a linear, every overhead included, over its K·N weights; columns that
only pad it don't count as weights.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.format import GroupMap
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import LinearSpec, find_source
from dbrx_quant.runtime.folder.contents import Contents, read_contents
from dbrx_quant.runtime.folder.sizes import linear_bits

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class LinearFacts:
    """One linear of a quantized checkpoint.

    Attributes:
        name: its EXL2 key.
        role: as in `LinearSpec`.
        block: its decoder block, None for the head.
        expert: its expert, None outside experts.
        shape: (K, N), without padding.
        bits: what it takes on disk.
        groups: its group map; None where it is stored in 16 or 32 bits.
    """

    name: str
    role: str
    block: int | None
    expert: int | None
    shape: tuple[int, int]
    bits: int
    groups: GroupMap | None

    @property
    def weights(self) -> int:
        """K·N."""
        return self.shape[0] * self.shape[1]

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return self.bits / self.weights

    @property
    def widths(self) -> dict[int, int]:
        """Bit width → input channels stored at it, widest first; empty where it is not quantized."""
        rows: Counter[int] = Counter()
        for group in self.groups or ():
            rows[group.bits] += group.rows
        return dict(rows)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a group is the pair [bits, rows], `widths` its histogram in rows."""
        return {
            "bpw": self.bpw,
            "bits": self.bits,
            "shape": list(self.shape),
            "role": self.role,
            "block": self.block,
            "expert": self.expert,
            "widths": {str(bits): rows for bits, rows in self.widths.items()},
            "groups": None if self.groups is None else [[group.bits, group.rows] for group in self.groups],
        }


@dataclass(frozen=True)
class FolderFacts:
    """A quantized checkpoint.

    Attributes:
        family: of the model.
        linears: all linears in the order of the data, the head last.
        total_bytes: all tensors, the 16-bit ones included.
    """

    family: str
    linears: tuple[LinearFacts, ...]
    total_bytes: int

    @property
    def decoder(self) -> tuple[LinearFacts, ...]:
        """The linears of the blocks: all but the head."""
        return tuple(linear for linear in self.linears if linear.block is not None)

    @property
    def bpw(self) -> float:
        """Bits per weight of the blocks' linears: the figure that a target names."""
        return mean_bpw(self.decoder)

    @property
    def head_bpw(self) -> float:
        """Bits per weight of the head."""
        return mean_bpw(linear for linear in self.linears if linear.block is None)

    @property
    def roles(self) -> list[str]:
        """The roles of the blocks' linears, in the order of the data."""
        return list(dict.fromkeys(linear.role for linear in self.decoder))

    @property
    def blocks(self) -> dict[int, float]:
        """Block → bits per weight."""
        return grouped_bpw(self.decoder, lambda linear: linear.block or 0)

    @property
    def block_roles(self) -> dict[tuple[int, str], float]:
        """(block, role) → bits per weight, over all experts of the block."""
        return grouped_bpw(self.decoder, lambda linear: (linear.block or 0, linear.role))

    @property
    def experts(self) -> dict[tuple[int, int], float]:
        """(block, expert) → bits per weight."""
        experts = (linear for linear in self.decoder if linear.expert is not None)
        return grouped_bpw(experts, lambda linear: (linear.block or 0, linear.expert or 0))

    @property
    def role_widths(self) -> dict[str, dict[int, float]]:
        """Role (the head's too) → bit width → share of its weights; widest first."""
        weights: dict[str, Counter[int]] = {}
        totals: Counter[str] = Counter()
        for linear in self.linears:
            totals[linear.role] += linear.weights
            counts = weights.setdefault(linear.role, Counter())
            for bits, rows in linear.widths.items():
                counts[bits] += rows * linear.shape[1]
        return {
            role: {bits: counts[bits] / totals[role] for bits in sorted(counts, reverse=True)}
            for role, counts in weights.items()
        }

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the whole, then by block, role and expert, then linear by linear."""
        block_roles, experts = self.block_roles, self.experts
        return {
            "family": self.family,
            "bpw": self.bpw,
            "head_bpw": self.head_bpw,
            "total_bytes": self.total_bytes,
            "weights": sum(linear.weights for linear in self.decoder),
            "blocks": [
                {
                    "block": block,
                    "bpw": bpw,
                    "roles": {role: value for (at, role), value in block_roles.items() if at == block},
                    "experts": [value for (at, _), value in sorted(experts.items()) if at == block],
                }
                for block, bpw in self.blocks.items()
            ],
            "role_widths": {
                role: {str(bits): share for bits, share in shares.items()}
                for role, shares in self.role_widths.items()
            },
            "linears": {linear.name: linear.to_json() for linear in self.linears},
        }


def inspect_folder(folder: Path) -> FolderFacts:
    """The facts of a quantized folder, from headers and group tables alone.

    Raises:
        CheckpointError: it is no EXL2 checkpoint that fits its configuration.
    """
    architecture = describe(load_config(folder))
    contents = read_contents(architecture, architecture.open(folder))
    checkpoint = contents.checkpoint
    return FolderFacts(
        family=architecture.family,
        linears=tuple(_linear_facts(contents, spec) for spec in architecture.linears()),
        total_bytes=sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
    )


def mean_bpw(linears: Iterable[LinearFacts]) -> float:
    """Bits per weight of several linears together."""
    bits = weights = 0
    for linear in linears:
        bits, weights = bits + linear.bits, weights + linear.weights
    return bits / weights


def grouped_bpw(linears: Iterable[LinearFacts], key: Callable[[LinearFacts], Key]) -> dict[Key, float]:
    """Bits per weight of the linears that share a key, in order of first appearance."""
    groups: dict[Key, list[LinearFacts]] = {}
    for linear in linears:
        groups.setdefault(key(linear), []).append(linear)
    return {value: mean_bpw(members) for value, members in groups.items()}


def _linear_facts(contents: Contents, spec: LinearSpec) -> LinearFacts:
    groups = contents.groups.get(spec.name)
    bits = (
        _dense_bits(contents.checkpoint, spec) if groups is None else linear_bits(contents.checkpoint, spec)
    )
    return LinearFacts(spec.name, spec.role, spec.block, spec.expert, spec.shape, bits, groups)


def _dense_bits(checkpoint: Checkpoint, spec: LinearSpec) -> int:
    """Bits of a linear in 16 or 32 bits: its part of the tensor that holds it (the embedding, if tied)."""
    info = checkpoint.info(find_source(checkpoint, spec).tensor)
    return 8 * info.nbytes // math.prod(info.shape) * math.prod(spec.shape)
