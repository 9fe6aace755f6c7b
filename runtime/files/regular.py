"""Only regular files are opened: a FIFO, a socket or a device would keep its reader waiting, or never end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from dbrx_quant.runtime.files.errors import CheckpointError

# What readers of a model folder open, transformers' own among them.
_READ = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
_TEMPLATES = "additional_chat_templates"  # the one subfolder that transformers looks into
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading in binary.

    Raises:
        CheckpointError: it is no regular file.
        OSError: it cannot be opened.
    """
    descriptor = at_once(os.fspath(path), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def at_once(path: str, flags: int) -> int:
    """An opener for `open` that does not wait at a FIFO for somebody who writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_model_folder(folder: Path) -> None:
    """Raise CheckpointError unless all that readers of a model folder may open are regular files.

    For the sake of libraries, which open what has the right name. Links are followed.

    Raises:
        CheckpointError: names the first entry that is a FIFO, a socket or a device, or that has the name of a
            file but is a folder or a link that leads nowhere.
    """
    for inner in (folder, folder / _TEMPLATES):
        if not inner.is_dir():
            continue
        for path in sorted(inner.iterdir()):
            named = path.suffix.lower() in _READ
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if named:
                    raise CheckpointError(f"{path}: {error.strerror}, expected a regular file") from None
                continue
            if named or not stat.S_ISDIR(mode):
                _require_regular(path, mode)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise CheckpointError(f"{path}: {kind}, expected a regular file; remove it or put the file there")
