"""Finished linears and 16-bit tensors → the shards, index and checksums of a quantized checkpoint.

Each shard is one stream of copied bytes, as `shard_plan.py` has it: equal inputs give equal bytes. Index and
checksums come last, so their presence says that the set is complete.
"""

import errno
import hashlib
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint, TensorInfo, read_header
from dbrx_quant.runtime.exl2.format import GroupMap, padded_columns, validate_linear
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.families.facts import Architecture, FloatSpec, LinearSpec, to_half
from dbrx_quant.runtime.files.atomic import DTYPE_NAMES, naming, remove_leftovers, write_json, write_parts
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME, Checksum, write_checksums
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME
from dbrx_quant.runtime.shards.plan import MAX_SHARD_BYTES, Shard, is_shard, plan_shards

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_CHUNK_BYTES = 16 << 20
_SMALLEST_NORMAL = 2.0**-14


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
) -> list[Path]:
    """Write the weight files of a quantized checkpoint at once and return the shards in order.

    Written are `model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index; last of all
    `checksums.json` with size and SHA-256 of each shard. A run that was killed leaves no half shard, and the
    next one starts over. Shards of an earlier run are removed first.

    Args:
        out: the folder, made if needed.
        architecture: what the model consists of.
        checkpoint: the original, for the tensors kept in 16 bits (converted to float16).
        linears_folder: one `<name>.safetensors` for every quantized linear.
        max_shard_bytes: limit of a shard's file size, as in `plan_shards`.

    Raises:
        CheckpointError: a linear is missing or breaks the format, a 16-bit tensor does not fit float16 or has
            another shape, or `out` holds weight files that are not ours.
        ValueError: `out` is the original's folder.
        OSError: not enough room on the disk; nothing was written.
    """
    out, linears_folder = Path(out), Path(linears_folder)
    if out.resolve() in (checkpoint.folder.resolve(), linears_folder.resolve()):
        raise ValueError(f"{out}: the output folder must differ from the input folders")
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    check_foreign(out)

    groups = {spec.name: read_linear(spec, linears_folder)[0] for spec in architecture.linears()}
    shards = plan_shards(architecture, groups, max_shard_bytes)
    rounding = check_floats(architecture, checkpoint)
    check_room(out, shards)

    withdraw(out)
    checksums = {shard.name: write_shard(out, shard, checkpoint, linears_folder) for shard in shards}
    write_lists(out, shards, checksums, rounding)
    return [out / shard.name for shard in shards]


def check_foreign(out: Path) -> list[Path]:
    """The shards that are in a folder already, by name ours.

    Raises:
        CheckpointError: there is another.
    """
    present = sorted(out.glob("*.safetensors"))
    for file in present:
        if not is_shard(file.name):
            raise CheckpointError(
                f"{file}: not written by this converter, and readers would merge it; move it away"
            )
    return present


def check_room(out: Path, shards: Iterable[Shard], kept: Container[str] = ()) -> None:
    """Raise OSError unless the disk has room for shards, once those in place that are not kept are gone."""
    needed = sum(shard.size for shard in shards)
    free = shutil.disk_usage(out).free
    room = free + sum(file.stat().st_size for file in check_foreign(out) if file.name not in kept)
    if needed > room:
        raise OSError(
            errno.ENOSPC,
            f"the shards to come need {needed} bytes of disk, {room} are free; free some space and run again",
            str(out),
        )


def withdraw(out: Path, kept: Container[str] = (), others: Iterable[str] = ()) -> None:
    """Remove an earlier result before the first shard of another comes, what tells of its shards first.

    Args:
        out: the folder.
        kept: names of shards that stay.
        others: names of further files that go with it.
    """
    present = check_foreign(out)
    for name in (CHECKSUMS_NAME, INDEX_NAME, REPACKED_NAME, *others):
        (out / name).unlink(missing_ok=True)
    for file in present:
        if file.name not in kept:
            file.unlink()


def write_shard(out: Path, shard: Shard, checkpoint: Checkpoint, linears_folder: Path) -> Checksum:
    """Write one shard, atomically.

    Args:
        out: its folder.
        shard: what it holds.
        checkpoint: the original, for the tensors kept in 16 bits.
        linears_folder: has the files of its linears.

    Raises:
        CheckpointError: a linear is missing, breaks the format or is not as planned.
    """
    sources: dict[str, TensorInfo] = {}
    for spec in shard.linears:
        sources |= read_linear(spec, linears_folder)[1]
    for tensor in shard.tensors:
        info = sources.get(tensor.name)
        if isinstance(tensor.owner, LinearSpec) and info is None:
            raise CheckpointError(f"{linears_folder}: {tensor.name}: missing, but planned")
        if info is not None and (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"{info.file}: {tensor.name}: {info.dtype} {info.shape}, planned as {tensor.dtype} "
                f"{tensor.shape}; its groups are not those of the strategy"
            )
    digest = hashlib.sha256()
    parts = chain((shard.header,), _contents(shard, checkpoint, sources))
    write_parts(out / shard.name, _digested(parts, digest.update), shard.size)
    return Checksum(digest.hexdigest(), shard.size)


def write_lists(
    out: Path, shards: Sequence[Shard], checksums: Mapping[str, Checksum], rounding: Mapping[str, Rounding]
) -> None:
    """Write what tells of a complete set of shards: the index where there are several, then the checksums."""
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    flushed = {name: count.zero for name, count in sorted(rounding.items()) if count.zero}
    write_checksums(out, checksums, flushed)


def read_linear(spec: LinearSpec, folder: Path) -> tuple[GroupMap, dict[str, TensorInfo]]:
    """The group map of a finished linear and the tensors of its file, from its header and small tensors.

    Raises:
        CheckpointError: it is missing, breaks the format, or has another shape than the model requires.
    """
    file = folder / f"{spec.name}.safetensors"
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
    groups = validate_linear(tensors, spec.name, str(file))
    found = (tensors["q_invperm"].shape[0], tensors["q_weight"].shape[1])
    expected = (spec.shape[0], padded_columns(spec.shape[1]))
    if found != expected:
        raise CheckpointError(f"{file}: {spec.name}: is {found} (K, N), the model requires {expected}")
    if ("bias" in tensors) != spec.bias:
        raise CheckpointError(
            f"{file}: {spec.name}.bias: {'missing' if spec.bias else 'present'}, "
            f"the model's linear has {'one' if spec.bias else 'none'}"
        )
    return groups, infos


def _digested(
    parts: Iterable[bytes | memoryview], digest: Callable[[bytes | memoryview], None]
) -> Iterator[bytes | memoryview]:
    """Yield the parts, feeding each to a digest."""
    for part in parts:
        digest(part)
        yield part


def _contents(
    shard: Shard, checkpoint: Checkpoint, sources: Mapping[str, TensorInfo]
) -> Iterator[bytes | memoryview]:
    """The data bytes of a shard, in pieces of about 16 MB."""
    for tensor in shard.tensors:
        if isinstance(tensor.owner, FloatSpec):
            for _, half in _halves(tensor.owner, checkpoint):
                yield half.reshape(-1).view(torch.uint8).numpy().data
        else:
            yield from _copied_pieces(sources[tensor.name])


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


def check_floats(architecture: Architecture, checkpoint: Checkpoint) -> dict[str, Rounding]:
    """What float16 does to each 16-bit tensor of a model, by name.

    Raises:
        CheckpointError: one has another shape, or a value that is not finite or beyond float16's range.
    """
    for spec in architecture.all_floats():
        info = checkpoint.info(spec.name)
        if info.shape != spec.shape:
            raise CheckpointError(f"{info.file}: {spec.name}: shape {info.shape}, expected {spec.shape}")
    return {spec.name: count_rounding(spec, checkpoint) for spec in architecture.all_floats()}


def rounding_notes(rounding: Mapping[str, Rounding]) -> list[str]:
    """What readers of the report should know of it, a sentence for each tensor that has lost something."""
    return [
        f"{name}: too small for float16: {count.zero} values became zero, {count.subnormal} lost precision"
        for name, count in sorted(rounding.items())
        if count.zero or count.subnormal
    ]


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
        del rows
        checkpoint.release(spec.name)
