"""Repacked copies of linears for the CPU kernels, made at first use; they live as long as the stored tensors.

A copy takes what the stored tensors take (repacked.h). It stands for the very tensors it was made of:
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

from dbrx_quant.runtime.kernels import checks
from dbrx_quant.runtime.kernels.memo import remember, version_sum
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.kernels.structs import describe_experts, describe_linear
from dbrx_quant.runtime.library import _abi, _native


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


def _repack(struct: _abi.Linear) -> Tensor | None:
    """The block of one linear; None where scales are not finite, or so large that weights might overflow."""
    library = _native.library()
    size = ctypes.c_int64()
    _native.check(library.dbrxq_repacked_bytes(ctypes.byref(struct), ctypes.byref(size)), "repack")
    block = torch.empty(size.value, dtype=torch.uint8)
    status = library.dbrxq_repack(ctypes.byref(struct), block.data_ptr())
    if status == _abi.NOT_FINITE:
        return None
    _native.check(status, "repack")
    return block


def repacked_linear(stored: Stored, bias: Tensor | None, out_features: int) -> Repacked | None:
    """The repacked form of a linear, whose tensors are checked when it is made."""
    tensors = stored if bias is None else (*stored, bias)
    return _repacked(tensors, out_features, _checked_struct, stored, bias, out_features)


def _checked_struct(stored: Stored, bias: Tensor | None, out_features: int) -> list[_abi.Linear]:
    checks.stored_linear("linear", stored, bias, out_features, torch.device("cpu"))
    return [describe_linear(stored, bias, out_features)]


def repacked_experts(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> Repacked | None:
    """The repacked linears of all experts: every gate, then every up, then every down."""
    tensors = (*gate.tensors, *up.tensors, *down.tensors)
    return _repacked(tensors, x.shape[1], _checked_structs, x, gate, up, down)


def _checked_structs(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> list[_abi.Linear]:
    return [struct for table in describe_experts(x, gate, up, down) for struct in table]


def _repacked(
    tensors: Sequence[Tensor], number: int, describe: Callable[..., list[_abi.Linear]], *arguments: Any
) -> Repacked | None:
    """The repacked form of the linears that `tensors` hold; None where the integer kernels cannot take them.

    Args:
        tensors: all stored tensors, whose identity and version say whether a copy is still good.
        number: what a copy depends on beside them.
        describe: gives the structs of the linears from `arguments`; called when a copy must be made.
        arguments: for `describe`.
    """
    key = (number, *map(id, tensors))
    versions = version_sum(tensors)
    found = _cache.get(key)
    if found is not None and found.versions == versions:
        return found
    if found is None and key in _cache:
        return None
    blocks = []
    for struct in describe(*arguments):
        block = _repack(struct)
        if block is None:
            break
        blocks.append(block)
    else:
        pointers = (ctypes.c_void_p * len(blocks))(*(block.data_ptr() for block in blocks))
        remember(_cache, key, tensors, made := Repacked(tuple(blocks), pointers, versions))
        return made
    remember(_cache, key, tensors, None)
    return None
