"""`repacked.bin` of a quantized folder: its linears as the CPU kernels read them, ready to be mapped.

    | body of a linear | body of the next one | ... | footer, JSON | its length, 8 bytes | magic, 8 bytes |

Bodies (csrc/cpu/repacked/repacked.h) stand in the order of the architecture, so that an expert's three are
neighbours, each from a multiple of 4096 bytes on. Where one starts and what it takes follows from the shards,
not from the file: whatever is in it, nothing else is read. The footer says which shards the file was made of
and has a checksum of every linear, heads included, which the kernels compare when they first use it.
"""

import errno
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.files.atomic import fingerprint, write_parts
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import VERSION_KEY, Fields
from dbrx_quant.runtime.files.json_text import parse_json
from dbrx_quant.runtime.files.regular import open_regular
from dbrx_quant.runtime.folder.checksums import read_checksums
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.kernels.bodies import Body
from dbrx_quant.runtime.kernels.repacked import checksum, repack, sizes
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.kernels.structs import describe_linear
from dbrx_quant.runtime.library import _abi, _native

REPACKED_NAME = "repacked.bin"
REMEDY = "delete it, or make it anew with `dbrx-quant repack`"

_VERSION = 1
_MAGIC = b"DBRXQREP"
_TAIL = 8 + len(_MAGIC)
_PAGE = 4096
_LONGEST_FOOTER = 64 << 20
_LINE_BYTES = 256  # of the footer, at most, for each linear and shard beside its name


class OtherShardsError(CheckpointError):
    """A repacked file was made of other shards, or for another layout, than those that are there."""


@dataclass(frozen=True)
class Place:
    """Where the body of a linear is in the file, and how large the linear's head is.

    Attributes:
        spec: the linear.
        start: first byte.
        body_bytes: of the body.
        head_bytes: of the head, which is not in the file.
    """

    spec: LinearSpec
    start: int
    body_bytes: int
    head_bytes: int


@dataclass(frozen=True)
class RepackedFile:
    """A file that belongs to its shards, as far as the footer tells.

    Attributes:
        path: the file.
        places: of all its linears.
        checksums: name of a linear → checksum; None: the integer kernels cannot take it.
    """

    path: Path
    places: tuple[Place, ...]
    checksums: dict[str, int | None]

    def map(self) -> np.ndarray[Any, Any]:
        """The bytes of the file, mapped for reading."""
        _native.explain_bus_errors()
        with open_regular(self.path) as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        last = self.places[-1]
        if len(mapped) < last.start + last.body_bytes:
            raise CheckpointError(f"{self.path}: was cut while it was opened; {REMEDY}")
        return np.frombuffer(mapped, dtype=np.uint8)

    def mapped_bodies(self) -> dict[str, Body]:
        """Linear → its body in the mapped file, of all that have one."""
        data = self.map()
        made = {p.spec.name: self.body(p, data, data.ctypes.data + p.start, True) for p in self.places}
        return {name: body for name, body in made.items() if body is not None}

    def body(self, place: Place, memory: Any, address: int, mapped: bool) -> Body | None:
        """The body of a linear at an address within `memory`; None where it has none."""
        expected = self.checksums[place.spec.name]
        if expected is None:
            return None
        name = f"{self.path}: {place.spec.name}"
        return Body(address, place.body_bytes, expected, mapped, memory, name)


def plan_repacked(contents: Contents) -> tuple[Place, ...]:
    """Where the bodies of all quantized linears are in a file, from headers and small tensors alone.

    Raises:
        RuntimeError: there is no native library.
    """
    places, start = [], 0
    for spec, stored, bias in _linears(contents):
        head_bytes, body_bytes = sizes(describe_linear(stored, bias, spec.shape[1]))
        places.append(Place(spec, start, body_bytes, head_bytes))
        start += _whole_pages(body_bytes)
    return tuple(places)


def write_repacked(contents: Contents, progress: Callable[[int, int], None] | None = None) -> RepackedFile:
    """Make the file, atomically, with one linear in memory at a time; equal shards give equal bytes.

    Args:
        contents: the folder's.
        progress: called with (bytes written, total bytes).

    Raises:
        OSError: the folder cannot be written to, or the disk has too little room: then nothing was written.
        RuntimeError: there is no native library.
    """
    places = plan_repacked(contents)
    path = contents.checkpoint.folder / REPACKED_NAME
    names = [place.spec.name for place in places] + [file.name for file in contents.checkpoint.files()]
    footer = _LINE_BYTES * (1 + len(names)) + sum(len(name.encode()) for name in names)
    required = _end(places) + footer + _TAIL
    free = shutil.disk_usage(path.parent).free
    if required > free:
        text = f"{required} bytes required, {free} free; free some space and run again"
        raise OSError(errno.ENOSPC, text, str(path))
    checksums: dict[str, int | None] = {}
    write_parts(path, _parts(contents, places, checksums, progress), required)
    return RepackedFile(path, places, checksums)


def _parts(
    contents: Contents,
    places: tuple[Place, ...],
    checksums: dict[str, int | None],
    progress: Callable[[int, int], None] | None,
) -> Iterator[bytes | memoryview]:
    """The bytes of the file; fills `checksums`."""
    for place, (spec, stored, bias) in zip(places, _linears(contents), strict=True):
        block = repack(describe_linear(stored, bias, spec.shape[1]))
        if block is None:
            checksums[spec.name] = None
            yield bytes(place.body_bytes)
        else:
            assert isinstance(block.body, Tensor)
            checksums[spec.name] = checksum(block)
            yield block.body.numpy().data
        yield bytes(_whole_pages(place.body_bytes) - place.body_bytes)
        contents.checkpoint.release(f"{spec.name}.q_weight")
        if progress:
            progress(place.start + _whole_pages(place.body_bytes), _end(places))
    footer = {
        VERSION_KEY: _VERSION,
        "layout": _abi.LAYOUT_VERSION,
        "shards": _shards(contents),
        "linears": {name: None if sum is None else f"{sum:016x}" for name, sum in checksums.items()},
    }
    text = json.dumps(footer, indent=0, sort_keys=True).encode()
    yield text
    yield len(text).to_bytes(8, "little") + _MAGIC


def open_repacked(contents: Contents) -> RepackedFile | None:
    """The repacked file of a folder; None where it has none.

    Of the shards, samples are read and compared (`fingerprint`); of the file, its footer.

    Raises:
        OtherShardsError: it does not belong to these shards, or to this version.
        CheckpointError: it is damaged.
    """
    path = contents.checkpoint.folder / REPACKED_NAME
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - _TAIL))
            tail = stream.read(_TAIL)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MAGIC or length > min(size - _TAIL, _LONGEST_FOOTER):
                raise CheckpointError(f"{path}: not a complete file of repacked linears; {REMEDY}")
            stream.seek(size - _TAIL - length)
            text = stream.read(length)
    except FileNotFoundError:
        return None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its footer is damaged ({error}); {REMEDY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its footer is damaged; {REMEDY}")
    fields = Fields(path, content, REMEDY)
    for key, version in ((VERSION_KEY, _VERSION), ("layout", _abi.LAYOUT_VERSION)):
        if (found := fields.integer(key)) != version:
            raise OtherShardsError(f"{path}: {key} {found}, this program reads {version}; {REMEDY}")
    _compare_shards(fields, _shards(contents))
    places = plan_repacked(contents)
    if size - _TAIL - length != _end(places):
        raise CheckpointError(
            f"{path}: {size - _TAIL - length} bytes of linears, the shards make {_end(places)}; {REMEDY}"
        )
    return RepackedFile(path, places, _checksums(fields.object("linears"), places))


def _checksums(linears: Fields, places: tuple[Place, ...]) -> dict[str, int | None]:
    checksums: dict[str, int | None] = {}
    for place in places:
        name = place.spec.name
        text = linears.text_or_none(name)
        if text is not None and (len(text) != 16 or not set(text) <= set("0123456789abcdef")):
            raise linears.fault(name, f"{text[:80]!r}, expected 16 hexadecimal digits")
        checksums[name] = None if text is None else int(text, 16)
    return checksums


def _shards(contents: Contents) -> dict[str, dict[str, str | None]]:
    """What identifies the shards of a folder: samples, and their hashes where `checksums.json` has them."""
    try:
        listed = read_checksums(contents.checkpoint.folder)
    except (FileNotFoundError, CheckpointError):
        listed = {}
    files = contents.checkpoint.files()
    return {
        file.name: {
            "fingerprint": fingerprint(file),
            "sha256": listed[file.name].sha256 if file.name in listed else None,
        }
        for file in files
    }


def _compare_shards(fields: Fields, shards: dict[str, dict[str, str | None]]) -> None:
    """Raise OtherShardsError unless a footer names these shards. A hash that one side lacks says nothing."""
    said = {
        name: (one.text("fingerprint"), one.text_or_none("sha256")) for name, one in fields.objects("shards")
    }
    for name in sorted(said.keys() | shards.keys()):
        if name in said and name in shards:
            (sample, digest), now = said[name], shards[name]
            same_digest = digest is None or now["sha256"] is None or digest == now["sha256"]
            if sample == now["fingerprint"] and same_digest:
                continue
        raise OtherShardsError(
            f"{fields.file}: made of other shards than those beside it ({name} differs); {REMEDY}"
        )


def repacked_faults(
    contents: Contents, progress: Callable[[int], None] | None = None
) -> tuple[list[str], list[str]]:
    """Faults and warnings of a folder's repacked file: every linear is made anew and compared.

    A file of other shards is a warning, since nothing reads it.

    Args:
        contents: the folder's.
        progress: called with the bytes that were compared; None: the footer alone is looked at.
    """
    try:
        file = open_repacked(contents)
    except OtherShardsError as error:
        return [], [str(error)]
    except CheckpointError as error:
        return [str(error)], []
    if file is None or progress is None:
        return [], []
    faults = []
    stored_bytes = file.map()
    for place, (spec, stored, bias) in zip(file.places, _linears(contents), strict=True):
        block = repack(describe_linear(stored, bias, spec.shape[1]))
        said = file.checksums[spec.name]
        same = (said is None) == (block is None)
        if block is not None and same:
            assert isinstance(block.body, Tensor)
            found = stored_bytes[place.start : place.start + place.body_bytes]
            same = said == checksum(block) and np.array_equal(found, block.body.numpy())
        if not same:
            faults.append(f"{file.path}: {spec.name}: is not what its shard makes; {REMEDY}")
        contents.checkpoint.release(f"{spec.name}.q_weight")
        progress(_whole_pages(place.body_bytes))
    return faults, []


def _linears(contents: Contents) -> Iterator[tuple[LinearSpec, Stored, Tensor | None]]:
    """Every quantized linear with its stored tensors and bias."""
    for spec in contents.architecture.linears():
        if contents.is_quantized(spec):
            tensors = contents.checkpoint.linear(spec.name)
            yield spec, Stored.of(tensors), tensors.get("bias")


def _whole_pages(count: int) -> int:
    return -(-count // _PAGE) * _PAGE


def _end(places: tuple[Place, ...]) -> int:
    last = places[-1]
    return last.start + _whole_pages(last.body_bytes)
