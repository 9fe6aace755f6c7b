"""Folders of safetensors shards, read by header and memory-mapped: an unread tensor costs nothing."""

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.exl2.pickled import load_pickled
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME, read_index, weight_files
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.regular import open_regular
from dbrx_quant.runtime.files.watched import WatchedFile
from dbrx_quant.runtime.library._native import explain_bus_errors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 100_000_000  # the safetensors format's own bound
_MOST_DIMENSIONS = 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor: name, dtype, shape, and the bytes [start, end) of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is cut short, is no safetensors file, or its tensors overlap or leave gaps.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: {size} bytes, too short for a safetensors file; fetch it again")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _HEADER_LIMIT):
            pointer = prefix + stream.read(len(_LFS_POINTER) - 8) == _LFS_POINTER
            hint = "it is a git-lfs pointer; run `git lfs pull`" if pointer else "fetch it again"
            raise CheckpointError(f"{file}: its header claims {length} bytes, the file has {size}; {hint}")
        raw = stream.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors header ({error}); fetch it again") from None
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise CheckpointError(f"{file}: not a valid safetensors header ({kind}, expected an object)")
    entries.pop("__metadata__", None)
    infos = {name: _tensor_info(file, 8 + length, name, entry) for name, entry in entries.items()}
    expected = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != expected:
            raise CheckpointError(f"{file}: {name}: its data starts at {info.start}, expected {expected}")
        expected = info.end
    if expected != size:
        raise CheckpointError(f"{file}: {size} bytes, its header describes {expected}; fetch it again")
    return infos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header, whose names must differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        double = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{double!r} occurs twice")
    return made


def _tensor_info(file: Path, base: int, name: str, entry: Any) -> TensorInfo:
    """What the header says of one tensor, checked; its data is counted from `base`."""

    def fault(text: str) -> CheckpointError:
        return CheckpointError(f"{file}: {name}: {text}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise fault("not a valid safetensors header, which has dtype, shape and data_offsets for each tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(f"dtype {str(dtype)[:80]}; supported are {', '.join(_DTYPES)}")
    for key, numbers, most in (("shape", shape, _MOST_DIMENSIONS), ("data_offsets", offsets, 2)):
        counts = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        if not counts or len(numbers) > most:
            raise fault(f"{key} is {str(numbers)[:80]}, expected at most {most} whole numbers below 2^63")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise fault(f"data_offsets is {offsets}, expected the first byte and the end of its data")
    if math.prod(n or 1 for n in shape) >= 2**63:  # so that strides can be computed, of empty tensors too
        raise fault(f"shape {shape} is beyond 2^63 elements")
    info = TensorInfo(name, dtype, tuple(shape), file, base + offsets[0], base + offsets[1])
    required = _DTYPES[dtype].itemsize * math.prod(shape)
    if info.nbytes != required:
        raise fault(f"{info.nbytes} bytes, its shape {info.shape} requires {required}")
    return info


def read_files(files: Iterable[Path], normalise: Callable[[str], str] | None = None) -> dict[str, TensorInfo]:
    """The tensors of some weight files, by what `normalise` makes of the stored name.

    Raises:
        CheckpointError: a broken file, or a name stored twice.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in (_read_pickled if file.suffix == ".bin" else read_header)(file).items():
            known = normalise(name) if normalise else name
            if known in infos:
                other = infos[known].file.name
                raise CheckpointError(f"{file}: {name}: already stored in {other}; remove one of the two")
            infos[known] = info
    return infos


def _read_pickled(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a `.bin` file, which has no header that tells where they lie."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    infos = {}
    for name, tensor in load_pickled(file).items():
        if tensor.dtype not in names:
            raise CheckpointError(f"{file}: {name}: dtype {tensor.dtype}; supported are {', '.join(_DTYPES)}")
        infos[name] = TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), file, 0, tensor.nbytes)
    return infos


class Checkpoint:
    """A folder of safetensors shards seen as one mapping of lazily read tensors.

    Its files must stay as they are: each is compared with what it was whenever a tensor is loaded.

    Args:
        folder: the folder; which of its files belong to the checkpoint is up to `weight_files`.
        normalise: maps a stored name to the name it is known under here (identity if None).
        infos: its tensors by the name they are known under, from a caller who has read the headers and judges
            shards and index itself; None: all that the weight files hold.
        source: the folder is an original, which may have `.bin` files instead of shards.

    Raises:
        CheckpointError: no shards, a broken shard, a name stored twice, or an index that names a tensor or a
            shard that isn't there. An index none of whose shards exist is a stale copy from another
            checkpoint (exllamav2 leaves those) and is ignored.
    """

    def __init__(
        self,
        folder: Path,
        normalise: Callable[[str], str] | None = None,
        infos: Mapping[str, TensorInfo] | None = None,
        source: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        files = weight_files(self.folder, source) if infos is None else {i.file for i in infos.values()}
        self._watched = {file: WatchedFile(file) for file in files}
        self._infos = dict(read_files(files, normalise) if infos is None else infos)
        if infos is None:
            self._check_index()

    def _check_index(self) -> None:
        path, weight_map = self.folder / INDEX_NAME, read_index(self.folder)
        stored = {info.name: info.file.name for info in self._infos.values()}
        if weight_map is None or not set(stored.values()) & set(weight_map.values()):
            return
        for name, file in weight_map.items():
            if name not in stored:
                raise CheckpointError(f"{path}: names the tensor {name} in {file}, which does not hold it")
            if stored[name] != file:
                raise CheckpointError(f"{path}: places {name} in {file}, but it is in {stored[name]}")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """What the header says of `name`.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        return self._infos[name]

    def load(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor as a view of the mapped file (private: writing to it does not reach the disk).

        Args:
            name: its name.
            rows: (begin, end) along the first axis; None for all of it.
        """
        info = self.info(name)
        dtype = _DTYPES[info.dtype]
        self._watched[info.file].check()
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.file.suffix == ".bin":
            tensor = self._unpickled(info.file)[info.name]
            return tensor if rows is None else tensor[rows[0] : rows[1]]
        count = info.nbytes // dtype.itemsize
        tensor = torch.frombuffer(self._map(info.file), dtype=dtype, count=count, offset=info.start)
        tensor = tensor.reshape(info.shape)
        return tensor if rows is None else tensor[rows[0] : rows[1]]

    def files(self) -> list[Path]:
        """The files that it consists of."""
        return sorted(self._watched)

    def check_unchanged(self) -> None:
        """Raise ChangedError if a file is not what it was when the checkpoint was opened."""
        for watched in self._watched.values():
            watched.check()

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of that name is stored in EXL2 form."""
        return f"{linear}.q_weight" in self._infos

    def linear(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized linear, keyed by suffix.

        Raises:
            CheckpointError: one is missing.
        """
        tensors = {suffix: self.load(f"{name}.{suffix}") for suffix in SUFFIXES}
        if f"{name}.bias" in self._infos:
            tensors["bias"] = self.load(f"{name}.bias")
        return tensors

    def release(self, name: str) -> None:
        """Drop the memory that reading a tensor has filled; its file's pages are read again when needed.

        For whoever streams: without it, what was read once counts as this process's memory until the system
        wants it back. Changes made to tensors of that file since they were loaded are lost.
        """
        mapped = self._maps.get(self.info(name).file)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    def release_all(self) -> None:
        """Drop the memory that reading has filled, of all files, as `release` does of one."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            explain_bus_errors()
            with open_regular(file) as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickled:
            explain_bus_errors()
            self._pickled[file] = load_pickled(file)
        return self._pickled[file]
