"""Files that must stay as they are while they are in use: known when opened, compared when used again."""

import os
import stat
from pathlib import Path

from dbrx_quant.runtime.files.atomic import WHOLE_BYTES, fingerprint
from dbrx_quant.runtime.files.errors import CheckpointError


class ChangedError(CheckpointError):
    """A file is not what it was when it was opened."""


class WatchedFile:
    """A file as it is now, or its absence.

    Touching it or putting an equal file in its place changes nothing, where the contents can be compared: of
    large files, a fingerprint sees samples only, so that these must be the same file with the same time.

    Args:
        path: the file; links are followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)
        small = self._identity is not None and self._identity[2] <= WHOLE_BYTES
        self._fingerprint = fingerprint(path) if small and stat.S_ISREG(os.stat(path).st_mode) else None

    def check(self) -> None:
        """Compare the file with what it was.

        Raises:
            ChangedError: its contents have changed, or it is gone, or new.
        """
        now = _identity(self.path)
        if now == self._identity:
            return
        if now is None or self._identity is None:
            what = "is gone" if now is None else "has appeared"
        elif now[2] != self._identity[2]:
            what = f"has {now[2]} bytes instead of {self._identity[2]}"
        elif now[2] > WHOLE_BYTES or fingerprint(self.path) != self._fingerprint:
            what = "has been written to or replaced"
        else:
            self._identity = now
            return
        raise ChangedError(
            f"{self.path}: {what} since it was opened; leave it alone and start over with --resume never"
        )


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    """Device, inode, size and time of a file; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
