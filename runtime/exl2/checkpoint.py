"""Folders of safetensors shards, read by header and memory-mapped: an unread tensor costs nothing."""

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import load_json

INDEX_NAME = "model.safetensors.index.json"

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
    size = file.stat().st_size
    with file.open("rb") as stream:
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
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            str(name): TensorInfo(
                str(name),
                str(entry["dtype"]),
                tuple(int(d) for d in entry["shape"]),
                file,
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors header ({error})") from None
    expected = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(f"{file}: {name}: dtype {info.dtype}; supported are {known}")
        expected_bytes = _DTYPES[info.dtype].itemsize
        for dimension in info.shape:
            expected_bytes *= dimension
        if min(info.shape, default=0) < 0 or info.nbytes != expected_bytes:
            raise CheckpointError(
                f"{file}: {name}: {info.nbytes} bytes, its shape {info.shape} requires {expected_bytes}"
            )
        if info.start != expected:
            raise CheckpointError(f"{file}: {name}: its data starts at {info.start}, expected {expected}")
        expected = info.end
    if expected != size:
        raise CheckpointError(f"{file}: {size} bytes, its header describes {expected}; fetch it again")
    return tensors


def read_index(folder: Path) -> dict[str, str] | None:
    """Stored name → file name by a folder's index; None where it has none.

    Raises:
        CheckpointError: it is no index.
    """
    path = folder / INDEX_NAME
    try:
        weight_map = load_json(path)["weight_map"]
        return {str(name): str(file) for name, file in dict(weight_map).items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r}); delete or rewrite it") from None


def read_shards(folder: Path, normalise: Callable[[str], str] | None = None) -> dict[str, TensorInfo]:
    """The tensors of all `*.safetensors` files of a folder, by what `normalise` makes of the stored name.

    Raises:
        CheckpointError: no shards, a broken shard, or a name stored twice.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors files in it")
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            known = normalise(name) if normalise else name
            if known in infos:
                other = infos[known].file.name
                raise CheckpointError(f"{file}: {name}: already stored in {other}; remove one of the two")
            infos[known] = info
    return infos


class Checkpoint:
    """A folder of safetensors shards seen as one mapping of lazily read tensors.

    Args:
        folder: the folder; every `*.safetensors` file in it belongs to the checkpoint.
        normalise: maps a stored name to the name it is known under here (identity if None).
        infos: its tensors by the name they are known under, from a caller who has read the headers and judges
            shards and index itself; None: all that the folder holds.

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
    ) -> None:
        self.folder = Path(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._infos = dict(read_shards(self.folder, normalise) if infos is None else infos)
        if infos is None:
            self._check_index()

    def _check_index(self) -> None:
        path, weight_map = self.folder / INDEX_NAME, read_index(self.folder)
        stored = {info.name: info.file.name for info in self._infos.values()}
        if weight_map is None or not set(stored.values()) & set(weight_map.values()):
            return
        for name, file in weight_map.items():
            if not (self.folder / file).exists():
                raise CheckpointError(f"{path}: names the shard {file}, which isn't there; fetch it again")
            if name not in stored:
                raise CheckpointError(f"{path}: names the tensor {name}, which no shard holds")
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
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        count = info.nbytes // dtype.itemsize
        tensor = torch.frombuffer(self._map(info.file), dtype=dtype, count=count, offset=info.start)
        tensor = tensor.reshape(info.shape)
        return tensor if rows is None else tensor[rows[0] : rows[1]]

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

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]
