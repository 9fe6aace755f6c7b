"""Repacked linears for the CPU kernels, made at first use; they live as long as the stored tensors.

A repacked linear has a small head and a body (repacked.h), which takes what the stored tensors take. It
stands for the very tensors it was made of: when one of them is freed it goes too, and when one was modified
in place it is made again. Where the linear was given a body (`bodies.py`), only the head is made. Else the
body is a copy in memory, and a stored tensor that is mapped from a file needs no memory of its own any more:
its pages are marked as cold, so that the system takes them back first.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels import checks
from dbrx_quant.runtime.kernels.bodies import Body, body_of
from dbrx_quant.runtime.kernels.memo import remember, version_sum
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.kernels.structs import describe_experts, describe_linear
from dbrx_quant.runtime.library import _abi, _native


@dataclass(frozen=True)
class Block:
    """One repacked linear.

    Attributes:
        head: uint8; its address stands for the linear.
        body: uint8, or one that the linear was given.
    """

    head: Tensor
    body: Tensor | Body

    @property
    def address(self) -> int:
        """What the kernels take."""
        return self.head.data_ptr()


@dataclass(frozen=True)
class Repacked:
    """Linears ready for one call.

    Attributes:
        blocks: one a linear.
        pointers: C array of the blocks' addresses.
        versions: sum of the version counters of the tensors that the blocks were made of.
    """

    blocks: tuple[Block, ...]
    pointers: Any
    versions: int

    def check(self, status: int, what: str) -> None:
        """As `_native.check`; of a damaged body, the error names it."""
        if status == _abi.DAMAGED:
            raise_damaged(self.blocks)
        _native.check(status, what)


_cache: dict[tuple[int, ...], Repacked | None] = {}


def sizes(struct: _abi.Linear) -> tuple[int, int]:
    """Bytes of head and body of a linear."""
    head, body = ctypes.c_int64(), ctypes.c_int64()
    status = _native.library().dbrxq_repacked_bytes(
        ctypes.byref(struct), ctypes.byref(head), ctypes.byref(body)
    )
    _native.check(status, "repack")
    return head.value, body.value


def repack(struct: _abi.Linear, given: Body | None = None) -> Block | None:
    """One repacked linear; None where scales are not finite, or so large that weights might overflow.

    Args:
        struct: describes it.
        given: a body that was made of it earlier.

    Raises:
        CheckpointError: the body has another size.
    """
    library = _native.library()
    head_bytes, body_bytes = sizes(struct)
    head = torch.empty(head_bytes, dtype=torch.uint8)
    body: Tensor | Body
    if given is None:
        body = torch.empty(body_bytes, dtype=torch.uint8)
        status = library.dbrxq_repack(ctypes.byref(struct), head.data_ptr(), body.data_ptr())
    else:
        if given.size != body_bytes:
            raise given.damaged()
        body = given
        status = library.dbrxq_repacked_head(
            ctypes.byref(struct), body.address, body.checksum, body.mapped, head.data_ptr()
        )
    if status == _abi.NOT_FINITE:
        return None
    _native.check(status, "repack")
    return Block(head, body)


def checksum(block: Block) -> int:
    """Of all that the results of a repacked linear depend on."""
    found = ctypes.c_uint64()
    _native.check(_native.library().dbrxq_repacked_checksum(block.address, ctypes.byref(found)), "checksum")
    return found.value


def raise_damaged(blocks: Sequence[Block]) -> None:
    """Raise CheckpointError naming the first block whose body differs from its checksum, if there is one."""
    for block in blocks:
        if not isinstance(block.body, Body):
            continue
        if _native.library().dbrxq_repacked_check(block.address) == _abi.DAMAGED:
            raise block.body.damaged()


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
    structs = describe(*arguments)
    each = len(tensors) // len(structs)
    for index, struct in enumerate(structs):
        own = tensors[each * index : each * (index + 1)]
        block = repack(struct, body_of(own, struct.out_features))
        if block is None:
            break
        blocks.append(block)
    else:
        pointers = (ctypes.c_void_p * len(blocks))(*(block.address for block in blocks))
        remember(_cache, key, tensors, made := Repacked(tuple(blocks), pointers, versions))
        return made
    remember(_cache, key, tensors, None)
    return None
