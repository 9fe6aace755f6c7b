"""The native CPU library: found, checked and typed at the first call, its statuses turned into exceptions.

`csrc/include/dbrxq.h` describes every function; the table below lists them in the order of that header.
The library follows `torch.get_num_threads()`: `library()` passes the number on whenever it has changed.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.runtime._shared_library import find_library, load_library

ABI_VERSION = 4
LIBRARY_NAME = "libdbrxq_cpu.so"
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as dbrxq.h numbers them
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_BAD_ISA, _NO_MEMORY = 6, 7


class Linear(Structure):
    """`dbrxq_linear`: pointers to the tensors of one quantized linear, and its sizes."""

    _fields_ = (
        ("q_weight", c_void_p),
        ("q_scale", c_void_p),
        ("q_scale_max", c_void_p),
        ("q_groups", c_void_p),
        ("q_invperm", c_void_p),
        ("bias", c_void_p),
        ("k", c_int64),
        ("n", c_int64),
        ("word_rows", c_int64),
        ("groups", c_int64),
        ("out_features", c_int64),
    )


class DecoderLayer(Structure):
    """`dbrxq_decoder_layer`: pointers to the weights of one layer."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", c_void_p * 3),
        ("output", c_void_p),
        ("mlp", c_void_p * 3),
        ("router", c_void_p),
        ("experts", c_void_p),
        ("expert_count", c_int64),
        ("active", c_int64),
        ("expert_norm", c_float),
        ("reserved", c_int32),
    )


class Decoder(Structure):
    """`dbrxq_decoder`: the layers of a model, and what they share."""

    _fields_ = (
        ("layers", POINTER(DecoderLayer)),
        ("final_norm", c_void_p),
        ("layer_count", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("clip", c_float),
        ("eps", c_float),
        ("layer_norm", c_int32),
        ("activation", c_int32),
        ("dtype", c_int32),
        ("activation_bits", c_int32),
        ("reserved", c_int32),
    )


# name: (result, arguments), in the order of dbrxq.h
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dbrxq_abi_version": (c_int, []),
    "dbrxq_set_threads": (None, [c_int]),
    "dbrxq_threads": (c_int, []),
    "dbrxq_status_text": (c_char_p, [c_int]),
    "dbrxq_isa": (c_char_p, []),
    "dbrxq_set_isa": (c_int, [c_char_p]),
    "dbrxq_pack_codes": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "dbrxq_unpack_codes": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "dbrxq_dequantize": (c_int, [POINTER(Linear), c_void_p]),
    "dbrxq_linear_forward": (c_int, [POINTER(Linear), c_void_p, c_int64, c_void_p]),
    "dbrxq_experts_forward": (
        c_int,
        [c_void_p] * 3 + [c_int64] * 4 + [POINTER(Linear)] * 3 + [c_int, c_void_p],
    ),
    "dbrxq_packed_bytes": (c_int, [POINTER(Linear), POINTER(c_int64)]),
    "dbrxq_pack": (c_int, [POINTER(Linear), c_void_p]),
    "dbrxq_packed_linear": (c_int, [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p]),
    "dbrxq_read_memory": (c_int, [c_void_p, c_int64, POINTER(c_uint64)]),
    "dbrxq_packed_experts": (
        c_int,
        [c_void_p, c_int64, c_int] + [c_void_p] * 3 + [c_int64] * 3 + [c_int, c_void_p],
    ),
    "dbrxq_decode": (c_int, [POINTER(Decoder), c_void_p] + [c_int64] * 3 + [c_void_p] * 4),
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None
_threads_sent: int | None = None
_threads_fixed = False


def _find() -> Path:
    return find_library(LIBRARY_NAME, "a C++ compiler")


def _load() -> ctypes.CDLL:
    return load_library(_find(), "a dbrx-quant library", "dbrxq_abi_version", ABI_VERSION, _SIGNATURES)


def library() -> ctypes.CDLL:
    """The typed library, set to torch's number of threads.

    Raises:
        RuntimeError: it is missing, does not load, or has another ABI version; remembered once it happened.
    """
    global _library, _failure, _threads_sent
    if _library is None:
        with _lock:
            if _failure is not None:
                raise RuntimeError(_failure)
            if _library is None:
                try:
                    _library = _load()
                except RuntimeError as error:
                    _failure = str(error)
                    raise
    if not _threads_fixed:
        count = torch.get_num_threads()
        if count != _threads_sent:
            _library.dbrxq_set_threads(count)
            _threads_sent = count
    return _library


def available() -> bool:
    """Whether the library can be used; `why_unavailable` says why not."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """The reason why the library cannot be used, or None when it can."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


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
    if status == _NO_MEMORY:
        raise MemoryError(text)
    if status == _BAD_ISA:
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
