"""The vocabulary of the family tables, and the one place that reads dense weights under their many names.

A linear is known by its EXL2 key (as exllamav2 writes it), by the transformers module that owns it, and by
the places where a source checkpoint may keep its dense weight. Source names are normalised first
(`Architecture.renames`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.files.errors import CheckpointError

ATTENTION_ROLES = ("q", "k", "v", "o")
WRAPPERS = ("_orig_mod.", "module.")
_BARE = {"layers", "blocks", "embed_tokens", "wte", "norm", "norm_f"}
_DENSE_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Source:
    """A place where a dense weight may be stored.

    Attributes:
        tensor: normalised tensor name.
        rows: the rows of it that are this linear's, or None for all.
        transposed: stored [in, out] instead of [out, in]; None: decided by the shape.
        of: how many rows the tensor has in all, where it has more than this linear's.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    transposed: bool | None = False
    of: int | None = None


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer that gets quantized.

    Attributes:
        name: EXL2 key, such as `model.layers.0.self_attn.q_proj`.
        role: q, k, v, o, gate, up, down or head; shared_gate, shared_up and shared_down are of an expert that
            every token passes, beside those that it is routed to.
        module: the transformers module that holds it.
        outputs: its slice of that module's outputs where the module fuses several linears.
        shape: (K, N), input and output channels, unpadded.
        sources: where the dense weight may be, in order of preference.
        bias: whether it has one.
        block: its decoder block, None for the head.
        expert: its expert, None outside experts.
    """

    name: str
    role: str
    module: str
    outputs: tuple[int, int] | None
    shape: tuple[int, int]
    sources: tuple[Source, ...]
    bias: bool = False
    block: int | None = None
    expert: int | None = None

    @property
    def writes_stream(self) -> bool:
        """Whether its output is added to the residual stream."""
        return self.role in ("o", "down", "shared_down")


@dataclass(frozen=True)
class FloatSpec:
    """A tensor kept in 16 bits: its EXL2 key (and normalised source name), its parameter and its shape."""

    name: str
    parameter: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts of one block: their module, and the (gate, up, down) linears of each."""

    module: str
    router: str
    active: int
    activation: str
    keys: tuple[str, str, str]
    linears: tuple[tuple[LinearSpec, LinearSpec, LinearSpec], ...]

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.linears)


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block: stages of linears that share an input, in data order, then routed experts if any.

    Attributes:
        index: of the block.
        module: the transformers module of the block.
        mlp: that of its feed-forward part, experts and router included.
        stages: attention, then a dense feed-forward part or an expert that every token passes, if any.
        experts: those that tokens are routed to.
        floats: its 16-bit tensors.
    """

    index: int
    module: str
    mlp: str
    stages: tuple[tuple[LinearSpec, ...], ...]
    experts: ExpertsSpec | None
    floats: tuple[FloatSpec, ...]

    @property
    def only_routed(self) -> bool:
        """Whether all that the feed-forward part adds comes from routed experts."""
        return all(spec.role in ATTENTION_ROLES for stage in self.stages for spec in stage)

    def linears(self) -> Iterator[LinearSpec]:
        """All linears of the block, in the order of the data, expert by expert."""
        for stage in self.stages:
            yield from stage
        for expert in self.experts.linears if self.experts else ():
            yield from expert


@dataclass(frozen=True)
class Architecture:
    """A whole model: blocks, the head, and the 16-bit tensors outside the blocks (embedding, final norm)."""

    family: str
    hidden: int
    vocabulary: int
    blocks: tuple[BlockSpec, ...]
    floats: tuple[FloatSpec, ...]
    head: LinearSpec
    tied: bool
    renames: tuple[tuple[str, str], ...]

    def linears(self) -> Iterator[LinearSpec]:
        """All linears, the head last."""
        for block in self.blocks:
            yield from block.linears()
        yield self.head

    def all_floats(self) -> Iterator[FloatSpec]:
        """All 16-bit tensors."""
        yield from self.floats
        for block in self.blocks:
            yield from block.floats

    def normalise(self, name: str) -> str:
        """The EXL2 name of a source tensor; EXL2 names map to themselves."""
        return normalised(name, self.renames)

    def open(self, folder: Any) -> Checkpoint:
        """The quantized checkpoint in a folder, under normalised names."""
        return Checkpoint(folder, self.normalise)


def normalised(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The EXL2 name of a source tensor; EXL2 names map to themselves.

    Models are saved with wrappers around them (DataParallel, torch.compile), or without their head's class,
    whose prefix is then missing.
    """
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    if name.partition(".")[0] in _BARE:
        name = f"model.{name}"
    for old, new in renames:
        name = name.replace(old, new)
    return name


def module_linears(specs: Iterable[LinearSpec]) -> dict[str, list[LinearSpec]]:
    """Linears by the transformers module that holds them, in order of their slice of its outputs."""
    grouped: dict[str, list[LinearSpec]] = {}
    for spec in specs:
        grouped.setdefault(spec.module, []).append(spec)
    return grouped


def find_source(checkpoint: Checkpoint, spec: LinearSpec) -> Source:
    """Where a checkpoint keeps a linear's dense weight.

    Raises:
        CheckpointError: in none of the places known, or with another shape.
    """
    for source in spec.sources:
        if source.tensor in checkpoint:
            _check_shape(checkpoint, spec, source)
            return source
    places = " or ".join(source.tensor for source in spec.sources)
    raise CheckpointError(f"{checkpoint.folder}: no weight for {spec.name}; looked for {places}")


def _check_shape(checkpoint: Checkpoint, spec: LinearSpec, source: Source) -> None:
    info = checkpoint.info(source.tensor)
    k, n = spec.shape
    rows = source.rows
    shapes = {False: [(n, k)], True: [(k, n)], None: [(n, k), (k, n)]}[source.transposed]
    found = info.shape
    if rows is not None and len(found) == 2 and found[0] == source.of:
        found = (rows[1] - rows[0], found[1])
    if found not in shapes:
        raise CheckpointError(
            f"{info.file}: {source.tensor}: shape {info.shape} does not hold {spec.name} as "
            + " or ".join(map(str, shapes))
            + (f" in its rows {rows[0]} to {rows[1]} of {source.of}" if rows else "")
        )


def load_linear(checkpoint: Checkpoint, spec: LinearSpec) -> Tensor:
    """The dense weight [N, K] of a linear, in its stored dtype, a view of the mapped file where possible.

    Raises:
        CheckpointError: it isn't there, or has another shape than the configuration says.
    """
    source = find_source(checkpoint, spec)
    weight = checkpoint.load(source.tensor, source.rows)
    transposed = source.transposed
    if transposed is None:
        transposed = tuple(weight.shape) != (spec.shape[1], spec.shape[0])
    return weight.T if transposed else weight


def load_bias(checkpoint: Checkpoint, spec: LinearSpec) -> Tensor | None:
    """The bias [N] of a linear, or None where it has none."""
    return checkpoint.load(f"{spec.name}.bias") if spec.bias else None


def check_dense_source(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint holds every tensor of the architecture and no others."""
    used = set()
    for spec in architecture.linears():
        if checkpoint.is_quantized(spec.name):
            raise CheckpointError(
                f"{checkpoint.folder}: {spec.name} is quantized already; give the original model"
            )
        used.add(find_source(checkpoint, spec).tensor)
        _check_type(checkpoint, find_source(checkpoint, spec).tensor)
        if spec.bias:
            info = checkpoint.info(f"{spec.name}.bias")
            if info.shape != (spec.shape[1],):
                raise CheckpointError(
                    f"{info.file}: {spec.name}.bias: shape {info.shape}, not ({spec.shape[1]},)"
                )
            used.add(f"{spec.name}.bias")
    for kept in architecture.all_floats():
        info = checkpoint.info(kept.name)
        if info.shape != kept.shape:
            raise CheckpointError(f"{info.file}: {kept.name}: shape {info.shape}, expected {kept.shape}")
        _check_type(checkpoint, kept.name)
        used.add(kept.name)
    tied = {"lm_head.weight"} if architecture.tied else set()
    unknown = [
        n for n in checkpoint.names() if n not in used | tied and not n.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise CheckpointError(
            f"{checkpoint.folder}: tensors that do not belong to a {architecture.family} model: {shown}"
        )


def _check_type(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.info(name)
    if info.dtype not in _DENSE_TYPES:
        raise CheckpointError(
            f"{info.file}: {name}: type {info.dtype}, expected one of {', '.join(_DENSE_TYPES)}; "
            "give the original model, which is not quantized"
        )


def to_half(tensor: Tensor, name: str) -> Tensor:
    """A 16-bit tensor as stored in the output, float16.

    Raises:
        CheckpointError: a value is not finite, or beyond half precision (65504).
    """
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        worst = tensor.float().abs().max().item()
        raise CheckpointError(f"{name}: largest magnitude {worst:g} does not fit in float16 (65504)")
    return half
