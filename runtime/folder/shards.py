"""Finished linears and 16-bit tensors → the shards, index and checksums of a quantized checkpoint.

Everything is planned from headers first, so that sizes, names and offsets are known before a byte is written;
then each shard is one stream of copied bytes. Equal inputs give equal bytes. A shard looks like this:

    | header length, 8 bytes | header, JSON, padded with spaces | all q_weight | all q_invperm | all q_scale |
    | all floats | all bias | all q_groups | all q_scale_max |    ^ a multiple of 64 bytes from the start

Sorted this way every packed word lies aligned when the file is mapped into memory: the tensors of the first
kinds are multiples of 16 bytes long, only the tail holds odd sizes, and the format allows no gaps.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint, TensorInfo, read_header
from dbrx_quant.runtime.exl2.format import padded_columns, validate_linear
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.families.facts import (
    ATTENTION_ROLES,
    Architecture,
    BlockSpec,
    FloatSpec,
    LinearSpec,
    to_half,
)
from dbrx_quant.runtime.files.atomic import DTYPE_NAMES, naming, remove_leftovers, write_json, write_parts
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME, Checksum, write_checksums
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME

MAX_SHARD_BYTES = 8_000_000_000

_KINDS = ("q_weight", "q_invperm", "q_scale", "weight", "bias", "q_groups", "q_scale_max")
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_ALIGNMENT = 64
_ENTRY_BYTES = 128  # at most, of a tensor's header entry, its name aside
_CHUNK_BYTES = 16 << 20
_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class PlannedTensor:
    """An output tensor: its name, and the bytes or the 16-bit tensor it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorInfo | FloatSpec

    @property
    def kind(self) -> int:
        """Place of the tensor's kind in a shard."""
        return _KINDS.index(self.name.rsplit(".", 1)[1])

    @property
    def cost(self) -> int:
        """The most bytes of a shard that it takes, its header entry included."""
        return self.nbytes + len(self.name.encode()) + _ENTRY_BYTES


@dataclass(frozen=True)
class Rounding:
    """What float16 does to one tensor: how many values become zero, how many lose bits as subnormals."""

    zero: int
    subnormal: int


def write_shards(
    out: Path,
    architecture: Architecture,
    checkpoint: Checkpoint,
    linears_folder: Path,
    max_shard_bytes: int | float = MAX_SHARD_BYTES,
    notify: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the weight files of a quantized checkpoint and return the shards in order.

    Written are `model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index; last of all
    `checksums.json` with size and SHA-256 of each shard, so its presence says that the set is complete.
    A run that was killed leaves no half shard, and the next one starts over. Shards of an earlier run that
    are not part of this one are removed.

    Args:
        out: the folder, made if needed.
        architecture: what the model consists of.
        checkpoint: the original, for the tensors kept in 16 bits (converted to float16).
        linears_folder: one `<name>.safetensors` for every quantized linear.
        max_shard_bytes: limit of a shard's file size; only a larger single tensor exceeds it, in a file of
            its own. A linear's tensors stay together where they fit.
        notify: called with each note that readers of the report should see, a sentence each.

    Raises:
        CheckpointError: a linear is missing or breaks the format, a 16-bit tensor does not fit float16 or has
            another shape, or `out` holds weight files that are not ours.
        ValueError: `out` is the original's folder.
        OSError: not enough room on the disk; nothing was written.
    """
    out = Path(out)
    if out.resolve() in (checkpoint.folder.resolve(), Path(linears_folder).resolve()):
        raise ValueError(f"{out}: the output folder must differ from the input folders")
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    present = check_foreign(out)

    modules = plan_modules(architecture, checkpoint, Path(linears_folder))
    shards = split(modules, int(max_shard_bytes))
    # Done ahead of writing, so that a value beyond float16 is not found after fifty gigabytes.
    rounding = {spec.name: count_rounding(spec, checkpoint) for spec in architecture.all_floats()}
    paths = [out / name for name in shard_names(len(shards))]
    headers = [_header(shard) for shard in shards]
    sizes = [len(head) + sum(t.nbytes for t in shard) for head, shard in zip(headers, shards, strict=True)]
    check_room(out, paths, sizes)

    index = out / INDEX_NAME
    for stale in (index, out / CHECKSUMS_NAME, out / REPACKED_NAME):  # of other shards than those to come
        stale.unlink(missing_ok=True)
    checksums: dict[str, Checksum] = {}
    for path, head, shard, size in zip(paths, headers, shards, sizes, strict=True):
        digest = hashlib.sha256()
        parts = chain((head,), _contents(shard, checkpoint))
        write_parts(path, _digested(parts, digest.update), size)
        checksums[path.name] = Checksum(digest.hexdigest(), size)
    for file in present:
        if file not in paths:
            file.unlink()

    if len(paths) > 1:
        weight_map = {t.name: path.name for path, shard in zip(paths, shards, strict=True) for t in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    flushed = {name: count.zero for name, count in sorted(rounding.items()) if count.zero}
    write_checksums(out, checksums, flushed)
    if notify:
        for name, count in sorted(rounding.items()):
            if count.zero or count.subnormal:
                notify(
                    f"{name}: too small for float16: {count.zero} values became zero, "
                    f"{count.subnormal} lost precision"
                )
    return paths


def check_foreign(out: Path) -> list[Path]:
    """The shards that are in a folder already, by name ours.

    Raises:
        CheckpointError: there is another.
    """
    present = sorted(out.glob("*.safetensors"))
    for file in present:
        if not _SHARD.fullmatch(file.name):
            raise CheckpointError(
                f"{file}: not written by this converter, and readers would merge it; move it away"
            )
    return present


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


def plan_modules(
    architecture: Architecture, checkpoint: Checkpoint, linears_folder: Path
) -> list[list[PlannedTensor]]:
    """The output's tensors, module by module, from headers and small tensors alone.

    Raises:
        CheckpointError: as in `write_shards`.
    """
    modules = []
    for spec in module_order(architecture):
        if isinstance(spec, LinearSpec):
            modules.append(_plan_linear(spec, linears_folder / f"{spec.name}.safetensors"))
            continue
        info = checkpoint.info(spec.name)
        if info.shape != spec.shape:
            raise CheckpointError(f"{info.file}: {spec.name}: shape {info.shape}, expected {spec.shape}")
        nbytes = 2 * torch.Size(spec.shape).numel()
        modules.append([PlannedTensor(spec.name, "F16", spec.shape, nbytes, spec)])
    return modules


def _plan_linear(spec: LinearSpec, file: Path) -> list[PlannedTensor]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; {spec.name} has not been quantized")
    infos = read_header(file)
    for name in infos:
        if name.rpartition(".")[0] != spec.name:
            raise CheckpointError(f"{file}: holds {name}, which is not a tensor of {spec.name}")
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name, info in infos.items():
            suffix = name.rpartition(".")[2]
            big = suffix in ("q_weight", "q_scale")  # their shape is all that the rules ask for
            dtype = _TORCH_DTYPES[info.dtype]
            tensors[suffix] = (
                torch.empty(info.shape, dtype=dtype, device="meta") if big else opened.get_tensor(name)
            )
    validate_linear(tensors, spec.name, str(file))
    found = (tensors["q_invperm"].shape[0], tensors["q_weight"].shape[1])
    expected = (spec.shape[0], padded_columns(spec.shape[1]))
    if found != expected:
        raise CheckpointError(f"{file}: {spec.name}: is {found} (K, N), the model requires {expected}")
    if ("bias" in tensors) != spec.bias:
        raise CheckpointError(
            f"{file}: {spec.name}.bias: {'missing' if spec.bias else 'present'}, "
            f"the model's linear has {'one' if spec.bias else 'none'}"
        )
    planned = [PlannedTensor(name, info.dtype, info.shape, info.nbytes, info) for name, info in infos.items()]
    return sorted(planned, key=lambda tensor: tensor.kind)


def split(modules: Iterable[list[PlannedTensor]], limit: int) -> list[list[PlannedTensor]]:
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


def shard_names(count: int) -> list[str]:
    """The file names of `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def check_room(out: Path, paths: list[Path], sizes: list[int]) -> None:
    """Raise OSError unless the disk can hold the shards; files that get replaced free their space.

    A file is written beside the one it replaces, so the peak may lie before the end.
    """
    balance = peak = 0
    for path, size in zip(paths, sizes, strict=True):
        balance += size
        peak = max(peak, balance)
        balance -= path.stat().st_size if path.is_file() else 0
    free = shutil.disk_usage(out).free
    if peak > free:
        raise OSError(
            errno.ENOSPC,
            f"{sum(sizes)} bytes of shards need {peak} more bytes of disk, {free} are free; free some space",
            str(out),
        )


def _header(shard: list[PlannedTensor]) -> bytes:
    """A shard's first bytes, up to its data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
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


def _digested(
    parts: Iterable[bytes | memoryview], digest: Callable[[bytes | memoryview], None]
) -> Iterator[bytes | memoryview]:
    """Yield the parts, feeding each to a digest."""
    for part in parts:
        digest(part)
        yield part


def _contents(shard: list[PlannedTensor], checkpoint: Checkpoint) -> Iterator[bytes | memoryview]:
    """The data bytes of a shard, in pieces of about 16 MB."""
    for tensor in shard:
        if isinstance(tensor.source, FloatSpec):
            for _, half in _halves(tensor.source, checkpoint):
                yield half.reshape(-1).view(torch.uint8).numpy().data
        else:
            yield from _copied_pieces(tensor.source)


def _copied_pieces(info: TensorInfo) -> Iterator[bytes]:
    with naming(info.file), info.file.open("rb") as file:
        file.seek(info.start)
        left = info.nbytes
        while left:
            piece = file.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise CheckpointError(
                    f"{info.file}: ended while it was being read; another process changed it"
                )
            left -= len(piece)
            yield piece


def count_rounding(spec: FloatSpec, checkpoint: Checkpoint) -> Rounding:
    """What becomes of the small values of a 16-bit tensor in float16.

    Raises:
        CheckpointError: a value is not finite or beyond float16's range.
    """
    zero = subnormal = 0
    for rows, half in _halves(spec, checkpoint):
        lost = (half.abs() < _SMALLEST_NORMAL) & (half.to(torch.float64) != rows.to(torch.float64))
        zero += int((lost & (half == 0)).sum())
        subnormal += int((lost & (half != 0)).sum())
    return Rounding(zero, subnormal)


def _halves(spec: FloatSpec, checkpoint: Checkpoint) -> Iterator[tuple[Tensor, Tensor]]:
    """A 16-bit tensor in runs of rows: as stored, and as float16."""
    info = checkpoint.info(spec.name)
    row_bytes = max(1, 8 * torch.Size(spec.shape[1:]).numel())
    step = max(1, _CHUNK_BYTES // row_bytes)
    for begin in range(0, spec.shape[0], step):
        rows = checkpoint.load(spec.name, (begin, min(begin + step, spec.shape[0])))
        yield rows, to_half(rows, f"{info.file}: {spec.name}").contiguous()
