"""What an EXL2 checkpoint holds of a model: checked tensor by tensor before anything is built from it.

Every linear is quantized except the attention of whole blocks, and the head, which may stay in 16 bits. The
rest is an error here, because transformers would only warn and go on with random weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.format import SUFFIXES, GroupMap, padded_columns, validate_linear
from dbrx_quant.runtime.families.facts import ATTENTION_ROLES, Architecture, LinearSpec, find_source
from dbrx_quant.runtime.files.errors import CheckpointError

DERIVED = (".q_perm", ".q_group_map", "rotary_emb.inv_freq")  # what old writers added; computed, never read
_FLOATS = ("F16", "BF16", "F32")
_SHOWN = 8


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint that fits its architecture.

    Attributes:
        checkpoint: where they are, under EXL2 names.
        architecture: the model they belong to.
        groups: the group map of each quantized linear, by the linear's name; all others are dense.
        names: every tensor that the model needs.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    groups: dict[str, GroupMap]
    names: tuple[str, ...]

    def is_quantized(self, spec: LinearSpec) -> bool:
        """Whether a linear is stored in EXL2 form."""
        return spec.name in self.groups


def read_contents(architecture: Architecture, checkpoint: Checkpoint) -> Contents:
    """Read an EXL2 checkpoint, validating every linear (headers, group tables, scales, permutations).

    Args:
        architecture: what the configuration describes.
        checkpoint: opened under the architecture's names.

    Raises:
        CheckpointError: a tensor is missing, has another shape or type than the configuration asks for, fits
            nowhere, or a linear that has to be quantized is not.
    """
    groups: dict[str, GroupMap] = {}
    names: list[str] = []
    unexpected = _unexpected(checkpoint, _possible(architecture))
    if not any(checkpoint.is_quantized(spec.name) for spec in architecture.linears()):
        raise CheckpointError(
            f"{checkpoint.folder}: none of its linears is stored as EXL2; it is not an EXL2 checkpoint of a "
            f"{architecture.family} model, or its tensors have unknown names{unexpected}"
        )
    for spec in _required(architecture, checkpoint):
        groups[spec.name] = _check_quantized(checkpoint, spec, unexpected)
        names += [f"{spec.name}.{suffix}" for suffix in _suffixes(spec)]
    for spec in architecture.linears():
        if spec.name not in groups:
            names += _check_dense(architecture, checkpoint, spec)
    for kept in architecture.all_floats():
        if kept.name not in checkpoint:
            raise _missing(checkpoint, kept.name, unexpected)
        _check_float(checkpoint, kept.name, kept.shape)
        names.append(kept.name)
    unexpected = _unexpected(checkpoint, set(names))
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json describes a {architecture.family} model with fewer tensors"
            f"{unexpected}"
        )
    return Contents(checkpoint, architecture, groups, tuple(dict.fromkeys(names)))


def _required(architecture: Architecture, checkpoint: Checkpoint) -> Iterator[LinearSpec]:
    """The linears that have to be in EXL2 form: all but whole dense attentions and a dense head."""
    for block in architecture.blocks:
        attention = [spec for spec in block.linears() if spec.role in ATTENTION_ROLES]
        dense = not any(checkpoint.is_quantized(spec.name) for spec in attention)
        stored = dense and any(s.tensor in checkpoint for spec in attention for s in spec.sources)
        for spec in block.linears():
            if not (stored and spec in attention):
                yield spec
    if checkpoint.is_quantized(architecture.head.name):
        yield architecture.head


def _suffixes(spec: LinearSpec) -> tuple[str, ...]:
    return (*SUFFIXES, "bias") if spec.bias else SUFFIXES


def _missing(checkpoint: Checkpoint, name: str, unexpected: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.folder}: {name}: missing; config.json requires it{unexpected}")


def _check_quantized(checkpoint: Checkpoint, spec: LinearSpec, unexpected: str) -> GroupMap:
    for source in spec.sources:
        if not checkpoint.is_quantized(spec.name) and source.tensor in checkpoint:
            raise CheckpointError(
                f"{checkpoint.info(source.tensor).file}: {source.tensor}: leaves {spec.name} unquantized; "
                "only whole attention layers and the head may be dense; convert the original model again"
            )
    for suffix in _suffixes(spec):
        if f"{spec.name}.{suffix}" not in checkpoint:
            raise _missing(checkpoint, f"{spec.name}.{suffix}", unexpected)
    file = str(checkpoint.info(f"{spec.name}.q_weight").file)
    tensors = checkpoint.linear(spec.name)
    groups = validate_linear(tensors, spec.name, file)
    if "bias" in tensors and not spec.bias:
        raise CheckpointError(f"{file}: {spec.name}.bias: this linear of the model has no bias")
    found = (tensors["q_invperm"].shape[0], tensors["q_weight"].shape[1])
    expected = (spec.shape[0], padded_columns(spec.shape[1]))
    if found != expected:
        raise CheckpointError(
            f"{file}: {spec.name}: {found[0]} input and {found[1]} output channels, config.json requires "
            f"{expected[0]} and {expected[1]} (output padded to a multiple of 32)"
        )
    return groups


def _check_dense(architecture: Architecture, checkpoint: Checkpoint, spec: LinearSpec) -> list[str]:
    head = spec is architecture.head
    if head and architecture.tied and "lm_head.weight" not in checkpoint:
        return []  # the embedding is the head
    tensor = "lm_head.weight" if head else find_source(checkpoint, spec).tensor
    if head:
        _check_float(checkpoint, tensor, (spec.shape[1], spec.shape[0]))
    names = [tensor]
    if spec.bias:
        _check_float(checkpoint, f"{spec.name}.bias", (spec.shape[1],))
        names.append(f"{spec.name}.bias")
    return names


def _check_float(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = checkpoint.info(name)
    if info.dtype not in _FLOATS:
        raise CheckpointError(f"{info.file}: {name}: type {info.dtype}, expected one of {', '.join(_FLOATS)}")
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: {name}: shape {info.shape}, config.json requires {shape}")


def _possible(architecture: Architecture) -> set[str]:
    """Every tensor that some checkpoint of the architecture may hold."""
    names = {kept.name for kept in architecture.all_floats()} | {"lm_head.weight"}
    for spec in architecture.linears():
        names.update(f"{spec.name}.{suffix}" for suffix in (*SUFFIXES, "bias"))
        names.update(source.tensor for source in spec.sources)
    return names


def _unexpected(checkpoint: Checkpoint, known: set[str]) -> str:
    """The tensors that are not in `known`, for a message; empty where there are none."""
    left = [name for name in checkpoint.names() if name not in known and not name.endswith(DERIVED)]
    if not left:
        return ""
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return f"; unexpected tensors: {', '.join(left[:_SHOWN])}{more}"
