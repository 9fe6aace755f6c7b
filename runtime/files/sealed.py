"""Files that are read again later: a checksum beside each, compared whenever the file is read.

The checksum of `x` is in `.x.sha256`. It is written after the file and flushed to the disk on demand only:
where it is lost, the file counts as damaged and is made anew. SHA-256 takes 0.7 s of processor time a GB.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dbrx_quant.runtime.files.atomic import naming
from dbrx_quant.runtime.files.errors import CheckpointError

_CHECKSUM = re.compile("[0-9a-f]{64}")
_SUFFIXES = (".json", ".safetensors")


def seal(path: Path) -> None:
    """Put the checksum of a file that is complete beside it."""
    with naming(path):
        _checksum_of(path).write_text(sha256(path), encoding="ascii")


def flush_seal(path: Path) -> None:
    """Flush the checksum of a file to the disk, for a file that takes long to make anew."""
    for one in (_checksum_of(path), path.parent):
        with naming(one):
            descriptor = os.open(one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def seal_again(path: Path) -> None:
    """Seal a file that others depend on, as it was if it was there before.

    Raises:
        CheckpointError: its predecessor, which was damaged, had other contents.
    """
    before = _expected(path)
    if before is not None and before != sha256(path):
        path.unlink()
        raise CheckpointError(
            f"{path}: was damaged, and comes out otherwise now, while other work depends on what it was; "
            "start over with --resume never"
        )
    seal(path)


def seal_fault(path: Path) -> str | None:
    """What is wrong with a sealed file; None if it is as it was sealed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found, expected = sha256(path), _expected(path)
    if expected is None:
        return "there is no checksum of it"
    return None if found == expected else "damaged since it was written"


def check_seal(path: Path) -> None:
    """Raise CheckpointError unless a file is as it was sealed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if fault := seal_fault(path):
        raise CheckpointError(f"{path}: {fault}; run the same command again, which makes it anew")


def was_sealed(path: Path) -> bool:
    """Whether there is a checksum of a file, be the file there or not."""
    return _expected(path) is not None


def was_sealed_as(path: Path, content: bytes) -> bool:
    """Whether a file, lost or damaged by now, had this content when it was sealed."""
    return hashlib.sha256(content).hexdigest() == _expected(path)


def remove(path: Path) -> None:
    """Remove a file and its checksum, as far as they are there."""
    for one in (path, _checksum_of(path)):
        with naming(one):
            one.unlink(missing_ok=True)


def remove_damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Remove all JSON and tensors in a folder that are not as they were sealed, those below included.

    Hidden folders are left alone. Yields each file with what was wrong; its checksum stays, for `seal_again`.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix not in _SUFFIXES or path.name.startswith("."):
                continue
            if fault := seal_fault(path):
                path.unlink()
                yield path, fault


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _expected(path: Path) -> str | None:
    """The checksum of a file; None where there is none, or a part of one, as a killed process leaves it."""
    try:
        text = _checksum_of(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    return text if _CHECKSUM.fullmatch(text) else None
