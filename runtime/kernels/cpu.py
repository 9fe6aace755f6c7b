"""Every op through the native CPU library; falls back to `reference`, with one warning, where it is missing.

`ops.py` has checked shapes and dtypes (`linear` checks for itself); here pointers are collected and numbers
converted to fp32 and back.
`activations.py` chooses between the kernels: integers over repacked linears, or floats over the
stored ones.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels import checks, reference
from dbrx_quant.runtime.kernels.activations import BITS, activations
from dbrx_quant.runtime.kernels.repacked import raise_damaged, repacked_experts, repacked_linear
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.kernels.structs import describe_experts, describe_linear
from dbrx_quant.runtime.library import _abi, _native

_logger = logging.getLogger(__name__)


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning("native kernels are not used, plain torch runs instead (much slower): %s", reason)


def _native_ready() -> bool:
    """Whether the native library runs the ops; says so once when it does not."""
    if _native.LIBRARY.loaded is not None:
        return True
    reason = _native.why_unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


def _floats(x: Tensor) -> Tensor:
    x = x if x.dtype is torch.float32 else x.to(torch.float32)
    return x if x.is_contiguous() else x.contiguous()


def dequantize(stored: Stored, out_features: int) -> Tensor:
    """The exact weight [K, out_features] fp16, input channels in their original order."""
    if not _native_ready():
        return reference.dequantize(stored, out_features)
    struct = describe_linear(stored, None, out_features)
    weight = torch.empty(stored.k, out_features, dtype=torch.float16)
    status = _native.library().dbrxq_dequantize(ctypes.byref(struct), weight.data_ptr())
    _native.check(status, "dequantize")
    return weight


def linear(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> Tensor:
    """The product [..., out_features] of x [..., K] and the weight, plus bias, in x's dtype; checks them."""
    mode = activations()
    fast = None
    if mode != "float" and _native_ready():
        fast = repacked_linear(stored, bias, out_features)
    if fast is None:
        checks.linear_call(x, stored, bias, out_features)
        if not _native_ready():
            return reference.linear(x, stored, bias, out_features)
    else:
        checks.linear_input(x, stored)
    inputs = _floats(x)
    y = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32)
    tokens = y.numel() // out_features
    if fast is not None:
        status = _native.library().dbrxq_repacked_linear(
            fast.pointers, 1, BITS[mode], inputs.data_ptr(), tokens, y.data_ptr()
        )
        fast.check(status, "linear")
    else:
        struct = describe_linear(stored, bias, out_features)
        status = _native.library().dbrxq_linear_forward(
            ctypes.byref(struct), inputs.data_ptr(), tokens, y.data_ptr()
        )
        _native.check(status, "linear")
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def linears(x: Tensor, each: Sequence[tuple[Stored, Tensor | None, int]]) -> Tensor:
    """The products of x [..., K] and each of several linears side by side, in x's dtype; checks them.

    Args:
        x: the input of all.
        each: the other arguments of `linear`, of one or more linears.
    """
    mode = activations()
    fast = []
    if mode != "float" and _native_ready():
        fast = [repacked_linear(*one) for one in each]
    blocks = [one.blocks[0] for one in fast if one is not None]
    if len(blocks) < len(each):
        return torch.cat([linear(x, *one) for one in each], dim=-1)
    for stored, _, _ in each:
        checks.linear_input(x, stored)
    inputs = _floats(x)
    y = torch.empty(*x.shape[:-1], sum([width for _, _, width in each]), dtype=torch.float32)
    status = _native.library().dbrxq_repacked_linear(
        (ctypes.c_void_p * len(blocks))(*[block.address for block in blocks]),
        len(blocks),
        BITS[mode],
        inputs.data_ptr(),
        y.numel() // y.shape[-1],
        y.data_ptr(),
    )
    if status == _abi.DAMAGED:
        raise_damaged(blocks)
    _native.check(status, "linears")
    return y.to(x.dtype)


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: StoredList,
    up: StoredList,
    down: StoredList,
    activation: str,
) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in x's dtype."""
    if not _native_ready():
        checks.expert_linears(x, gate, up, down)
        return reference.experts(x, top_k_index, top_k_weights, gate, up, down, activation)
    tokens, hidden = x.shape
    inputs, weights = _floats(x), _floats(top_k_weights)
    index = top_k_index.to(torch.int64).contiguous()
    y = torch.empty(tokens, hidden, dtype=torch.float32)
    mode = activations()
    fast = None if mode == "float" else repacked_experts(x, gate, up, down)
    if fast is not None:
        status = _native.library().dbrxq_repacked_experts(
            fast.pointers,
            len(gate),
            BITS[mode],
            inputs.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            tokens,
            hidden,
            index.shape[1],
            _abi.ACTIVATIONS[activation],
            y.data_ptr(),
        )
        fast.check(status, "experts")
        return y.to(x.dtype)
    tables = describe_experts(x, gate, up, down)
    status = _native.library().dbrxq_experts_forward(
        inputs.data_ptr(),
        index.data_ptr(),
        weights.data_ptr(),
        tokens,
        hidden,
        index.shape[1],
        len(gate),
        *tables,
        _abi.ACTIVATIONS[activation],
        y.data_ptr(),
    )
    _native.check(status, "experts")
    return y.to(x.dtype)
