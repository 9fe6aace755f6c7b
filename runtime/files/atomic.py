"""Files that are either whole or absent, and fingerprints that tell when a source has changed.

Everything the project writes goes through here: a temporary file beside the goal, flushed to the disk,
renamed over the goal, and the folder flushed too, so that a kill or a power cut at any moment leaves the old
file or the new one. Equal contents give equal bytes, in any process: that is what lets a resumed conversion
be compared with an uninterrupted one.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# safetensors' names of the element types, and their sizes in bytes
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_LEFTOVER = ".part"
_WRITE_BYTES = 16 << 20
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 64
_LONGEST_NAME = 230  # bytes of a name that a temporary one repeats: names have 255 at most
WHOLE_BYTES = _SAMPLES * _SAMPLE_BYTES  # of a file up to this size, a fingerprint is of all bytes


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically.

    Raises:
        OSError: the disk is full (the message names path and required bytes), or there is no such folder.
    """
    write_parts(Path(path), (text.encode("utf-8"),))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as JSON that people can read and diff, atomically.

    Keys sorted, one level a space, lists of plain values on one line, a newline at the end. Python's shortest
    form of a float is kept, so numbers read back are equal to those written.

    Raises:
        TypeError: a key is not a string, or a value has no JSON form.
        ValueError: a number is NaN or infinite, which JSON cannot hold; or a text is no Unicode.
        OSError: as in `write_text`.
    """
    try:
        text = render_json(value) + "\n"
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: cannot be written ({error})") from error
    write_text(path, text)


def render_json(value: object, depth: int = 0) -> str:
    """The text that `write_json` writes, without the last newline."""
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, Mapping) and value:
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(
                f"JSON keys must be strings, got {wrong[0]!r}, which would not read back unchanged"
            )
        lines = (f"{json.dumps(key)}: {render_json(value[key], depth + 1)}" for key in sorted(value))
        return "{" + inner + ("," + inner).join(lines) + outer + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return "[" + inner + ("," + inner).join(render_json(item, depth + 1) for item in value) + outer + "]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically, with bytes that depend on the contents alone.

    safetensors' own writer puts the metadata in an order that differs from process to process (0.8.0), which
    would break byte-identical resuming; hence these lines. Layout as there: wide elements first, then by
    name, the header padded with spaces to a multiple of 8 bytes.

    Args:
        path: the file to write; its folder exists.
        tensors: name → tensor, on any device; views are written as contiguous tensors.
        metadata: text for the header's `__metadata__`.

    Raises:
        ValueError: an element type that safetensors has no name for, or the reserved tensor name.
        TypeError: metadata that is not text.
        OSError: as in `write_text`.
    """
    header: dict[str, object] = {}
    if metadata:
        wrong = [key for key, text in metadata.items() if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"{path}: metadata {wrong[0]!r} must be text, got {metadata[wrong[0]]!r}")
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"{path}: safetensors cannot store tensor {name!r} of type {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    parts = (_bytes_of(tensors[name]) for name in names)
    write_parts(Path(path), _chain(len(text).to_bytes(8, "little") + text, parts), 8 + len(text) + offset)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files that killed writers left in `folder`, and return their paths.

    Call it only when no other process is writing into that folder.
    """
    leftovers = sorted(Path(folder).glob(f".*{_LEFTOVER}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def fingerprint(path: str | os.PathLike[str]) -> str:
    """A text that changes when a source file does: its size and a hash, cheap on hundreds of gigabytes.

    Hashed are the size, the whole safetensors header (names, shapes and element types of all tensors) and 64
    samples of 64 KiB spread evenly from the first byte to the last; files of up to 4 MiB are hashed whole.
    Name, place and time of the file don't matter. About 5 MB are read of a file of any size, so a change
    inside a big tensor that touches no sample is not seen: it tells revisions apart, it is no checksum.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            header = 8 + int.from_bytes(file.read(8), "little")
            if path.suffix == ".safetensors" and header <= min(size, 100 << 20):
                digest.update(file.read(header - 8))
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()[:32]}"


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _chain(first: bytes, rest: Iterable[memoryview]) -> Iterable[bytes | memoryview]:
    yield first
    yield from rest


def write_parts(path: Path, parts: Iterable[bytes | memoryview], required: int | None = None) -> None:
    """Write `parts` one after another to `path`; `required` is their total size in bytes where it's known."""
    if required is None:
        parts = tuple(parts)
        required = sum(len(part) for part in parts)
    temporary = temporary_beside(path)
    try:
        with naming(path, temporary, required):
            with temporary.open("xb") as file:
                for part in parts:
                    for start in range(0, len(part), _WRITE_BYTES):
                        file.write(part[start : start + _WRITE_BYTES])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_place(path: Path) -> None:
    """Raise OSError unless a file can be written at `path`, by writing an empty one beside it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}; make it first", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder; give the name of a file", str(path))
    temporary = temporary_beside(path)
    with naming(path, temporary):
        temporary.open("xb").close()
        temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A name for what becomes `path` when it is complete; `remove_leftovers` knows it."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    return path.with_name(f".{name}.{secrets.token_hex(4)}{_LEFTOVER}")


@contextmanager
def naming(path: Path, temporary: Path | None = None, required: int | None = None) -> Iterator[None]:
    """Let system errors of the `with` block that name no file, or the temporary one, name `path`.

    Args:
        path: what is read or written.
        temporary: stands for it until it is complete.
        required: the bytes that are written, for the message of a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or str(error.filename or path) not in (str(path), str(temporary)):
            raise
        text = error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "disk full; free some space and run again"
            if required is not None:
                free = shutil.disk_usage(path.parent).free
                text = f"disk full: {required} bytes required, {free} free; free some space and run again"
        raise OSError(error.errno, text, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Flush the folder's list of names, without which a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
