"""A folder that one process at a time writes into."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path, patience: float = 0) -> Iterator[None]:
    """Keep other processes out of a folder while the `with` block runs.

    The folder is made if needed, and removed again where nothing came into it. The lock is a hidden file in
    it, which is gone at the end; what a killed process leaves does not lock. Links are not followed.

    Args:
        folder: the folder.
        patience: seconds to wait for another process.

    Raises:
        ValueError: another process holds the folder.
        OSError: the folder cannot be made or written.
    """
    made = _make(folder)
    path = folder / LOCK_NAME
    try:
        descriptor = _acquire(path, time.monotonic() + patience)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for one in made:
            try:
                one.rmdir()
            except OSError:
                break  # something is in it by now


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        wrong = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
        text = "not a folder; give another place"
        if wrong.is_symlink() and not os.path.exists(wrong):
            text = "a link that leads nowhere; give another place"
        raise NotADirectoryError(errno.ENOTDIR, text, str(wrong)) from None
    return missing


def _acquire(path: Path, deadline: float) -> int:
    """The descriptor of the lock file, which is held until it is closed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _not_a_file(path) from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _not_a_file(path)
            if _lock(descriptor, path, deadline) and _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it is held, or its holder has removed it meanwhile


def _lock(descriptor: int, path: Path, deadline: float) -> bool:
    """Whether the lock was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if time.monotonic() >= deadline:
            raise ValueError(f"{path.parent}: another process is working in this folder") from None
        time.sleep(0.05)
        return False
    except OSError as error:
        raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(path)) from error


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _not_a_file(path: Path) -> ValueError:
    return ValueError(f"{path}: a link or no file, where the lock of the folder belongs; remove it")
