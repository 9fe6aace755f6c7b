"""The native CUDA library: found, checked and typed at the first call, as `_native` does for the CPU.

It is built where a CUDA compiler is found; `csrc/include/dbrxq.h` describes every function, and the table
below lists them in the order of that header. It loads on machines without a GPU: only its calls fail there.
"""

import ctypes
import threading
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from dbrx_quant.runtime._native import ABI_VERSION
from dbrx_quant.runtime._shared_library import find_library, load_library

LIBRARY_NAME = "libdbrxq_cuda.so"
WIDTHS = 6

_ERROR_BASE = 1000


class CudaLinear(Structure):
    """`dbrxq_cuda_linear`: pointers to one linear in device layout, and its sizes."""

    _fields_ = (
        ("words", c_void_p),
        ("scale_codes", c_void_p),
        ("unit_scale", c_void_p),
        ("permutation", c_void_p),
        ("bias", c_void_p),
        ("k", c_int64),
        ("n", c_int64),
        ("out_features", c_int64),
        ("units", c_int64),
        ("first_unit", c_int32 * (WIDTHS + 1)),
        ("reserved", c_int32),
    )


class CudaExperts(Structure):
    """`dbrxq_cuda_experts`: device pointers to the arrays of a block's linears, and their sizes."""

    _fields_ = (
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("experts", c_int64),
        ("hidden", c_int64),
        ("ffn", c_int64),
        ("activation", c_int32),
        ("reserved", c_int32),
    )


# name: (result, arguments), in the order of dbrxq.h
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dbrxq_cuda_abi_version": (c_int, []),
    "dbrxq_cuda_status_text": (c_char_p, [c_int]),
    "dbrxq_cuda_repack": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p, c_void_p]),
    "dbrxq_cuda_unpack": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p]),
    "dbrxq_cuda_reconstruct": (c_int, [POINTER(CudaLinear), c_void_p, c_void_p]),
    "dbrxq_cuda_linear_workspace": (c_int, [POINTER(CudaLinear), c_int64, c_int, POINTER(c_int64)]),
    "dbrxq_cuda_linear_forward": (
        c_int,
        [POINTER(CudaLinear), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_void_p],
    ),
    "dbrxq_cuda_experts_workspace": (
        c_int,
        [POINTER(CudaExperts), c_int64, c_int64, c_int, POINTER(c_int64)],
    ),
    "dbrxq_cuda_experts_forward": (
        c_int,
        [POINTER(CudaExperts), *[c_void_p] * 3, c_int64, c_int64, c_int, *[c_void_p] * 3],
    ),
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, typed.

    Raises:
        RuntimeError: it does not load, is another library, or has another ABI version.
    """
    what = "dbrx-quant's CUDA library"
    return load_library(path, what, "dbrxq_cuda_abi_version", ABI_VERSION, _SIGNATURES)


def library() -> ctypes.CDLL:
    """The typed library of this installation.

    Raises:
        RuntimeError: it is missing or `load` refuses it; remembered once it happened.
    """
    global _library, _failure
    if _library is None:
        with _lock:
            if _failure is not None:
                raise RuntimeError(_failure)
            if _library is None:
                try:
                    _library = load(find_library(LIBRARY_NAME, "a CUDA compiler (nvcc)"))
                except RuntimeError as error:
                    _failure = str(error)
                    raise
    return _library


def use(path: Path) -> None:
    """Take the library at `path` instead of the installed one: for benchmarks and tests.

    Raises:
        RuntimeError: `load` refuses it.
    """
    global _library
    _library = load(path)


def why_unavailable() -> str | None:
    """The reason why the library cannot be used, or None when it can."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


def check(status: int, what: str) -> None:
    """Raise for a status other than 0.

    Raises:
        RuntimeError: the device refused or failed.
        ValueError: an argument is not what dbrxq.h asks for.
    """
    if status == 0:
        return
    text = f"{what}: {library().dbrxq_cuda_status_text(status).decode()}"
    raise RuntimeError(text) if status >= _ERROR_BASE else ValueError(text)
