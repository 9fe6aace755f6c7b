"""How fast this machine reads what a model is made of, from its disk and from its memory: short trials."""

import ctypes
import mmap
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from dbrx_quant.runtime.folder.repacked_file import Place, RepackedFile
from dbrx_quant.runtime.library import _native

_TOGETHER = 12  # linears that are asked for at once, as those of the experts of a token
_MOST_BYTES = 512 << 20
_MOST_SECONDS = 1.0
_MEMORY_BYTES = 256 << 20
_MEMORY_RUNS = 3
_LINES = 128  # bytes that `dbrxq_read_memory` reads at least


def disk_rate(file: RepackedFile, places: Sequence[Place]) -> float:
    """Bytes a second of linears of a mapped file, read as the kernels read them.

    They are taken from all over the file, and the system is asked to forget them first. Where another process
    has them in use, they stay in memory and the rate is the memory's.

    Args:
        file: the file.
        places: linears that may be read, one at least.
    """
    step = max(1, len(places) // _TOGETHER)
    groups = [list(places[first::step])[:_TOGETHER] for first in range(step)]
    seconds, total = 0.0, 0
    with file.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, dtype=np.uint8)
        for group in groups:
            for place in group:
                drop_pages(stream.fileno(), place)
            start = time.perf_counter()
            for place in group:
                mapped.madvise(mmap.MADV_WILLNEED, place.start, place.body_bytes)
            for place in group:
                _read(data.ctypes.data + place.start, place.body_bytes)
            seconds += time.perf_counter() - start
            total += sum(place.body_bytes for place in group)
            if seconds > _MOST_SECONDS or total > _MOST_BYTES:
                break
        del data
    return total / seconds


def memory_rate() -> float:
    """Bytes a second that all threads together read from memory."""
    memory = torch.ones(_MEMORY_BYTES, dtype=torch.uint8)
    fastest = float("inf")
    for _ in range(_MEMORY_RUNS):
        start = time.perf_counter()
        _read(memory.data_ptr(), _MEMORY_BYTES)
        fastest = min(fastest, time.perf_counter() - start)
    return _MEMORY_BYTES / fastest


def drop_pages(descriptor: int, place: Place) -> None:
    """Tell the system that it need not keep a linear's pages of the file; those in use elsewhere stay."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place.start, place.body_bytes, os.POSIX_FADV_DONTNEED)


def _read(address: int, count: int) -> None:
    ignored = ctypes.c_uint64()
    status = _native.library().dbrxq_read_memory(address, count // _LINES * _LINES, ctypes.byref(ignored))
    _native.check(status, "read")
