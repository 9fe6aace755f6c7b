"""Hidden states on disk: written once, renamed into place when complete, memory-mapped by whoever reads them.

The page cache keeps small ones in memory; large ones cost disk instead of memory. Each has its checksum
beside it (`runtime/files/sealed.py`), compared when it is opened.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.runtime.files.atomic import naming, temporary_beside
from dbrx_quant.runtime.files.sealed import check_seal, seal


@contextmanager
def new_states(path: Path, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A float32 tensor on disk, filled inside the `with` block; it gets its name only when that succeeds.

    Raises:
        OSError: the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        start = _reserve(temporary, path, shape)
        mapped = np.memmap(temporary, np.float32, "r+", start, shape)
        yield torch.from_numpy(mapped)
        with naming(path, temporary):
            mapped.flush()
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        seal(path)
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(temporary: Path, path: Path, shape: tuple[int, ...]) -> int:
    """Write the header of an .npy file and reserve space for its data; returns where the data starts.

    Without the room, a write to the mapped file would kill the process instead of raising.
    """
    size = 4 * math.prod(shape)
    with naming(path, temporary, size), temporary.open("xb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.flush()
        start = stream.tell()
        os.posix_fallocate(stream.fileno(), 0, start + size)
    return start


def open_states(path: Path) -> Tensor:
    """The float32 states in a file, as a private map (writing does not reach the disk).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not as it was written.
    """
    check_seal(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))
