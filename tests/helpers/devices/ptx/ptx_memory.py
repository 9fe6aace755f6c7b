"""Memory of the process as kernels see global memory: what they may touch, and the words at an address.

Tests run on the CPU: addresses that the host code gives to kernels are those of CPU tensors. A kernel may
touch the tensors whose address was asked for (`Tensor.data_ptr`), while their storage lives.
"""

import contextlib

import numpy as np
import torch
from ptx_text import PtxError
from ptx_types import UNSIGNED
from torch.multiprocessing.reductions import StorageWeakRef

_FIRST = 1 << 16  # no memory of a process lies below


class _Process:
    """The memory of this process as one array of words."""

    def __init__(self, size):
        words = ((1 << 47) - _FIRST) // size
        self.__array_interface__ = {
            "data": (_FIRST, False),
            "shape": (words,),
            "typestr": f"<u{size}",
            "version": 3,
        }


class Words:
    """Bytes that are read and written as aligned words; `at` is an int64 array of byte offsets."""

    def __init__(self, data):
        self.data = data
        self._views = {size: data.view(UNSIGNED[size]) for size in (1, 2, 4, 8)}

    def load(self, at, size):
        return self._views[size][at // size]

    def store(self, at, size, values):
        self._views[size][at // size] = values


class GlobalMemory(Words):
    """The process's memory, of which `live` tensors may be touched."""

    def __init__(self):
        self._views = {size: np.asarray(_Process(size)) for size in (1, 2, 4, 8)}
        self._taken = {}  # (first, end) → storage
        self._starts = self._ends = np.empty(0, np.int64)
        self.start()

    def load(self, at, size):
        return super().load(at - _FIRST, size)

    def store(self, at, size, values):
        super().store(at - _FIRST, size, values)

    def take(self, tensor, address):
        """Lets kernels touch a tensor."""
        if tensor.numel():
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            end = address + (last + 1) * tensor.element_size()
            self._taken[address, end] = StorageWeakRef(tensor.untyped_storage())

    def look(self):
        """Notes which tensors are live now."""
        self._taken = {span: storage for span, storage in self._taken.items() if not storage.expired()}
        merged = []
        for first, end in sorted(self._taken):
            if merged and first < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self._starts = np.array([-1, *(first for first, _ in merged)], np.int64)
        self._ends = np.array([-1, *(end for _, end in merged)], np.int64)

    def start(self):
        """Forgets what a launch before has promised and written."""
        self._promised, self._written = [], []

    def promise(self, at, size):
        """Notes loads that say that nothing writes there during the launch (`ld.global.nc`)."""
        self._promised.append(_words(at, size))

    def note(self, at, size):
        """Notes stores."""
        self._written.append(_words(at, size))

    def finish(self):
        """Raises PtxError where the launch has written what it promised not to."""
        if self._promised and self._written:
            both = np.intersect1d(np.concatenate(self._promised), np.concatenate(self._written))
            if len(both):
                raise PtxError(f"loads as read-only (.nc) what it writes, at {hex(4 * int(both[0]))}")

    def check(self, at, size):
        """Raises PtxError where words are not aligned or not inside of live tensors."""
        crooked = at % size != 0
        if crooked.any():
            raise PtxError(f"address {hex(at[crooked][0])} is not aligned to {size} bytes")
        place = np.searchsorted(self._starts, at, "right") - 1
        outside = at + size > self._ends[place]
        if outside.any():
            first = at[outside][0]
            near = int(place[outside][0])
            beyond = f"{first - self._ends[near]} bytes beyond the end of one" if near > 0 else "before all"
            raise PtxError(f"{size} bytes at {hex(first)} are outside of live tensors: {beyond}")


def _words(at, size):
    """Numbers of the words of 4 bytes that accesses touch, each once."""
    return np.unique((at >> 2)[:, None] + np.arange(max(1, size // 4)))


@contextlib.contextmanager
def watched(memory):
    """Within the context, a tensor whose address is asked for is open to kernels."""
    original = torch.Tensor.data_ptr

    def data_ptr(tensor):
        address = original(tensor)
        memory.take(tensor, address)
        return address

    torch.Tensor.data_ptr = data_ptr
    try:
        yield memory
    finally:
        torch.Tensor.data_ptr = original
