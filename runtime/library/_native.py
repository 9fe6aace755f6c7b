"""The native CPU library: its number of threads and instruction set, and its statuses as exceptions.

The library follows `torch.get_num_threads()`: `library()` passes the number on whenever it has changed. In a
forked child, where torch's threads are gone and waiting for them would never end, that number becomes 1.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dbrx_quant.runtime.library import _abi
from dbrx_quant.runtime.library._shared_library import SharedLibrary

LIBRARY = SharedLibrary(
    "libdbrxq_cpu.so",
    "a dbrx-quant library",
    "a C++ compiler",
    "dbrxq_abi_version",
    _abi.CPU_FUNCTIONS,
)

_threads_sent: int | None = None
_threads_fixed = False

why_unavailable = LIBRARY.why_unavailable


def library() -> ctypes.CDLL:
    """The typed library, set to torch's number of threads.

    Raises:
        RuntimeError: it is missing, does not load, or has another ABI version; remembered once it happened.
    """
    global _threads_sent
    handle = LIBRARY.loaded or LIBRARY.get()
    if not _threads_fixed:
        count = torch.get_num_threads()
        if count != _threads_sent:
            _prepare_for_forks()
            handle.dbrxq_set_threads(count)
            _threads_sent = count
    return handle


@cache
def _prepare_for_forks() -> None:
    """Let torch work on one thread in forked children, as in the workers of its own `DataLoader`."""
    os.register_at_fork(after_in_child=_stay_alone)


def _stay_alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def available() -> bool:
    """Whether the library can be used; `why_unavailable` says why not."""
    return why_unavailable() is None


def isa() -> str:
    """The instruction set that the kernels run on: `scalar`, `avx2`, `avxvnni` or `avx512`.

    It is `unusable` when DBRXQ_ISA names one that is unknown or that this CPU lacks; then every kernel fails.
    """
    return str(library().dbrxq_isa().decode())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the kernels on one instruction set inside the block (the whole process: for tests and benchmarks).

    Raises:
        RuntimeError: this CPU lacks it.
    """
    handle = library()
    before = handle.dbrxq_isa()
    check(handle.dbrxq_set_isa(name.encode()), f"instruction set {name}")
    try:
        yield
    finally:
        check(handle.dbrxq_set_isa(before), "instruction set")


def set_threads(count: int) -> None:
    """Use `count` threads from now on instead of following `torch.get_num_threads()`; 0 follows it again."""
    global _threads_fixed, _threads_sent
    if count < 0:
        raise ValueError(f"{count} threads; expected 1 or more, or 0 to follow torch")
    _threads_fixed, _threads_sent = False, None
    handle = library()
    if count:
        handle.dbrxq_set_threads(count)
        _threads_fixed = True


def explain_bus_errors() -> None:
    """Have a mapped file that is cut end the process with a line that names it, where the library is there.

    Nothing can be raised: the fault is in the middle of any instruction of any thread that reads the file.
    """
    if available():
        library().dbrxq_explain_bus_errors()


def check(status: int, what: str) -> None:
    """Raise for a status other than 0.

    Raises:
        MemoryError: the library ran out of memory.
        RuntimeError: it cannot run here.
        ValueError: an argument is not what dbrxq.h asks for.
    """
    if status == 0:
        return
    text = f"{what}: {library().dbrxq_status_text(status).decode()}"
    if status == _abi.NO_MEMORY:
        raise MemoryError(text)
    if status == _abi.BAD_ISA:
        raise RuntimeError(text)
    raise ValueError(text)


def pack_codes(codes: torch.Tensor, q_groups: torch.Tensor, word_rows: int) -> torch.Tensor:
    """Words [R, N] int32 from codes [K, N] uint8 in packed row order; `q_groups` int16 [2 G] as stored."""
    codes, q_groups = codes.contiguous(), q_groups.contiguous()
    k, n = codes.shape
    words = torch.empty(word_rows, n, dtype=torch.int32)
    groups = q_groups.numel() // 2
    status = library().dbrxq_pack_codes(
        codes.data_ptr(), q_groups.data_ptr(), groups, k, n, word_rows, words.data_ptr()
    )
    check(status, "pack_codes")
    return words


def unpack_codes(q_weight: torch.Tensor, q_groups: torch.Tensor, k: int) -> torch.Tensor:
    """Codes [K, N] uint8 in packed row order from words [R, N] int32; inverse of `pack_codes`."""
    q_weight, q_groups = q_weight.contiguous(), q_groups.contiguous()
    word_rows, n = q_weight.shape
    codes = torch.empty(k, n, dtype=torch.uint8)
    groups = q_groups.numel() // 2
    status = library().dbrxq_unpack_codes(
        q_weight.data_ptr(), q_groups.data_ptr(), groups, k, n, word_rows, codes.data_ptr()
    )
    check(status, "unpack_codes")
    return codes
