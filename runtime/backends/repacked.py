"""Repacked copies of linears for the CPU kernels, made at first use; they live as long as the stored tensors.

A copy takes what the stored tensors take (csrc/cpu/packed.h). It stands for the very tensors it was made of:
when one of them is freed the copy goes too, and when one was modified in place it is made again. A stored
tensor that is mapped from a file needs no memory of its own any more once its copy is made: its pages are
marked as cold, so that the system takes them back first.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime import _abi, _native
from dbrx_quant.runtime.backends.memo import remember, version_sum


@dataclass(frozen=True)
class Repacked:
    """Linears ready for one call.

    Attributes:
        blocks: uint8, one a linear.
        pointers: C array of the blocks' addresses.
        versions: sum of the version counters of the tensors that the blocks were made of.
    """

    blocks: tuple[Tensor, ...]
    pointers: Any
    versions: int


_cache: dict[tuple[int, ...], Repacked | None] = {}


def _pack(struct: _abi.Linear) -> Tensor | None:
    """The block of one linear; None where scales are not finite, or so large that weights may not be."""
    library = _native.library()
    size = ctypes.c_int64()
    _native.check(library.dbrxq_packed_bytes(ctypes.byref(struct), ctypes.byref(size)), "repack")
    block = torch.empty(size.value, dtype=torch.uint8)
    status = library.dbrxq_pack(ctypes.byref(struct), block.data_ptr())
    if status == _abi.NOT_FINITE:
        return None
    _native.check(status, "repack")
    return block


def repacked(
    tensors: Sequence[Tensor], key: tuple[int, ...], describe: Callable[[], Sequence[_abi.Linear]]
) -> Repacked | None:
    """The repacked form of the linears that `tensors` hold; None where the integer kernels cannot take them.

    Args:
        tensors: all stored tensors, whose identity and version say whether a copy is still good.
        key: the numbers beside them that a copy depends on.
        describe: the structs of the linears, called when a copy must be made.
    """
    key = (*key, *map(id, tensors))
    versions = version_sum(tensors)
    found = _cache.get(key)
    if found is not None and found.versions == versions:
        return found
    if found is None and key in _cache:
        return None
    blocks = []
    for struct in describe():
        block = _pack(struct)
        if block is None:
            break
        blocks.append(block)
    else:
        pointers = (ctypes.c_void_p * len(blocks))(*(block.data_ptr() for block in blocks))
        remember(_cache, key, tensors, made := Repacked(tuple(blocks), pointers, versions))
        return made
    remember(_cache, key, tensors, None)
    return None
