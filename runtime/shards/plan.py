"""Which shard of a quantized checkpoint holds which tensor, and where: known before anything is quantized.

Shapes and group maps decide it, so that names, headers and sizes of all shards come before the first linear
is solved. A shard looks like this:

    | header length, 8 bytes | header, JSON, padded with spaces | all q_weight | all q_invperm | all q_scale |
    | all floats | all bias | all q_groups | all q_scale_max |    ^ a multiple of 64 bytes from the start

Sorted this way every packed word lies aligned when the file is mapped into memory: the tensors of the first
kinds are multiples of 16 bytes long, only the tail holds odd sizes, and the format allows no gaps.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dbrx_quant.runtime.exl2.format import TENSORS, GroupMap, padded_columns
from dbrx_quant.runtime.families.facts import ATTENTION_ROLES, Architecture, BlockSpec, FloatSpec, LinearSpec
from dbrx_quant.runtime.files.atomic import DTYPE_NAMES

MAX_SHARD_BYTES = 8_000_000_000

_KINDS = ("q_weight", "q_invperm", "q_scale", "weight", "bias", "q_groups", "q_scale_max")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_ALIGNMENT = 64
_ENTRY_BYTES = 128  # at most, of a tensor's header entry, its name aside


@dataclass(frozen=True)
class PlannedTensor:
    """An output tensor, and the linear it is part of or the 16-bit tensor that it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    owner: LinearSpec | FloatSpec

    @property
    def suffix(self) -> str:
        """The last part of the name, which is the tensor's kind."""
        return self.name.rpartition(".")[2]

    @property
    def kind(self) -> int:
        """Place of the tensor's kind in a shard."""
        return _KINDS.index(self.suffix)

    @property
    def cost(self) -> int:
        """The most bytes of a shard that it takes, its header entry included."""
        return self.nbytes + len(self.name.encode()) + _ENTRY_BYTES


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint: its name, and its tensors in the order of the file."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The first bytes, up to the data."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The linears that have tensors in it."""
        owners = {tensor.owner.name: tensor.owner for tensor in self.tensors}
        return tuple(owner for owner in owners.values() if isinstance(owner, LinearSpec))


def plan_shards(
    architecture: Architecture, groups: Mapping[str, GroupMap], max_shard_bytes: int | float = MAX_SHARD_BYTES
) -> list[Shard]:
    """The shards of a checkpoint, in order.

    Args:
        architecture: what the model consists of.
        groups: linear → its group map.
        max_shard_bytes: limit of a shard's file size; only a larger single tensor exceeds it, in a file of
            its own. A linear's tensors stay together where they fit.
    """
    modules = (
        _plan_linear(spec, groups[spec.name]) if isinstance(spec, LinearSpec) else [_plan_float(spec)]
        for spec in module_order(architecture)
    )
    parts = _split(modules, int(max_shard_bytes))
    return [Shard(name, tuple(part)) for name, part in zip(_names(len(parts)), parts, strict=True)]


def module_order(architecture: Architecture) -> Iterator[LinearSpec | FloatSpec]:
    """Every part of the model in the order that exllamav2 writes them."""
    embedding, *final = architecture.floats
    yield embedding
    for block in architecture.blocks:
        yield from _block_order(block)
    yield from final
    yield architecture.head


def _block_order(block: BlockSpec) -> Iterator[LinearSpec | FloatSpec]:
    linears = [spec for stage in block.stages for spec in stage]
    first = [spec for spec in block.floats if ".input_layernorm." in spec.name]
    head_norms = [spec for spec in block.floats if ".self_attn." in spec.name]
    yield from first
    yield from (spec for spec in linears if spec.role in ATTENTION_ROLES)
    yield from head_norms
    yield from (spec for spec in block.floats if spec not in first + head_norms)
    yield from (spec for spec in linears if spec.role not in ATTENTION_ROLES)
    for expert in block.experts.linears if block.experts else ():
        yield from expert


def _plan_linear(spec: LinearSpec, groups: GroupMap) -> list[PlannedTensor]:
    k, n = spec.shape[0], padded_columns(spec.shape[1])
    shapes = {
        "q_weight": (sum(group.word_rows for group in groups), n),
        "q_scale": (len(groups), n // 8),
        "q_scale_max": (len(groups),),
        "q_groups": (2 * len(groups),),
        "q_invperm": (k,),
    }
    if spec.bias:
        shapes["bias"] = (n,)
    planned = []
    for suffix, shape in shapes.items():
        dtype = TENSORS[suffix][0]
        nbytes = dtype.itemsize * math.prod(shape)
        planned.append(PlannedTensor(f"{spec.name}.{suffix}", DTYPE_NAMES[dtype], shape, nbytes, spec))
    return sorted(planned, key=lambda tensor: tensor.kind)


def _plan_float(spec: FloatSpec) -> PlannedTensor:
    return PlannedTensor(spec.name, "F16", spec.shape, 2 * math.prod(spec.shape), spec)


def _split(modules: Iterable[list[PlannedTensor]], limit: int) -> list[list[PlannedTensor]]:
    """Tensors shard by shard, each shard's in the order of the file.

    Args:
        modules: tensors that belong together, in the order of the model.
        limit: largest file size in bytes.
    """
    room = limit - 8 - _ALIGNMENT - len('{"__metadata__":{"format":"pt"}}')
    shards: list[list[PlannedTensor]] = []
    left = 0
    for module in modules:
        whole = sum(tensor.cost for tensor in module) <= room
        for part in [module] if whole else [[tensor] for tensor in module]:
            cost = sum(tensor.cost for tensor in part)
            if not shards or cost > left:
                shards.append([])
                left = room
            shards[-1] += part
            left -= cost
    return [sorted(shard, key=lambda tensor: tensor.kind) for shard in shards]  # stable: model order


def _names(count: int) -> list[str]:
    """The file names of `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def is_shard(name: str) -> bool:
    """Whether a file name is one that a plan gives."""
    return bool(_SHARD.fullmatch(name))
