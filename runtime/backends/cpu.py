"""Every op through the native CPU library; falls back to `reference`, with one warning, where it is missing.

`ops.py` has checked shapes and dtypes (`linear` checks for itself); here pointers are collected and numbers
converted to fp32 and back.
`runtime/activations.py` chooses between the kernels: integers over repacked linears, or floats over the
stored ones.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime import _abi, _native
from dbrx_quant.runtime.activations import BITS, activations
from dbrx_quant.runtime.backends import checks, reference
from dbrx_quant.runtime.backends.repacked import Repacked, repacked

_logger = logging.getLogger(__name__)

_EXPERTS_CACHE_LIMIT = 512  # blocks whose pointer tables are kept
_experts_cache: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning("native kernels are not used, plain torch runs instead (much slower): %s", reason)


def _native_ready() -> bool:
    """Whether the native library runs the ops; says so once when it does not."""
    reason = _native.why_unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


def _floats(x: Tensor) -> Tensor:
    x = x if x.dtype is torch.float32 else x.to(torch.float32)
    return x if x.is_contiguous() else x.contiguous()


def describe_linear(
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> _abi.Linear:
    """The C struct of a linear; it points into the tensors, which must stay alive and contiguous."""
    word_rows, n = q_weight.shape
    return _abi.Linear(
        q_weight.data_ptr(),
        q_scale.data_ptr(),
        q_scale_max.data_ptr(),
        q_groups.data_ptr(),
        q_invperm.data_ptr(),
        None if bias is None else bias.data_ptr(),
        q_invperm.shape[0],
        n,
        word_rows,
        q_scale_max.shape[0],
        out_features,
    )


def dequantize(
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    out_features: int,
) -> Tensor:
    """The exact weight [K, out_features] fp16, input channels in their original order."""
    if not _native_ready():
        return reference.dequantize(q_weight, q_scale, q_scale_max, q_groups, q_invperm, out_features)
    struct = describe_linear(q_weight, q_scale, q_scale_max, q_groups, q_invperm, None, out_features)
    weight = torch.empty(q_invperm.shape[0], out_features, dtype=torch.float16)
    status = _native.library().dbrxq_dequantize(ctypes.byref(struct), weight.data_ptr())
    _native.check(status, "dequantize")
    return weight


def repacked_linear(
    stored: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], bias: Tensor | None, out_features: int
) -> Repacked | None:
    """The repacked form of a linear, whose tensors are checked when it is made."""

    def describe() -> list[_abi.Linear]:
        checks.stored_linear("linear", (*stored, bias), out_features, torch.device("cpu"))
        return [describe_linear(*stored, bias, out_features)]

    return repacked(stored if bias is None else (*stored, bias), (out_features,), describe)


def linear(
    x: Tensor,
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """The product [..., out_features] of x [..., K] and the weight, plus bias, in x's dtype; checks them."""
    stored = (q_weight, q_scale, q_scale_max, q_groups, q_invperm)
    mode = activations()
    fast = None
    if mode != "float" and _native_ready():
        fast = repacked_linear(stored, bias, out_features)
    if fast is None:
        checks.linear_call(x, (*stored, bias), out_features)
        if not _native_ready():
            return reference.linear(x, *stored, bias, out_features)
    else:
        checks.linear_input(x, q_invperm)
    inputs = _floats(x)
    y = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32)
    tokens = y.numel() // out_features
    if fast is not None:
        status = _native.library().dbrxq_packed_linear(
            fast.pointers, 1, BITS[mode], inputs.data_ptr(), tokens, y.data_ptr()
        )
    else:
        struct = describe_linear(*stored, bias, out_features)
        status = _native.library().dbrxq_linear_forward(
            ctypes.byref(struct), inputs.data_ptr(), tokens, y.data_ptr()
        )
    _native.check(status, "linear")
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def linears(
    x: Tensor, stored: Sequence[Tensor], biases: Sequence[Tensor | None], out_features: Sequence[int]
) -> Tensor:
    """The products of x [..., K] and each of several linears side by side, in x's dtype; checks them."""
    mode = activations()
    each = checks.each_linear(stored, biases, out_features)
    fast = []
    if mode != "float" and _native_ready():
        fast = [repacked_linear(one[:5], one[5], one[6]) for one in each]
    blocks = [one.blocks[0].data_ptr() for one in fast if one is not None]
    if len(blocks) < len(each):
        return torch.cat([linear(x, *one) for one in each], dim=-1)
    for one in each:
        checks.linear_input(x, one[4])
    inputs = _floats(x)
    y = torch.empty(*x.shape[:-1], sum(out_features), dtype=torch.float32)
    status = _native.library().dbrxq_packed_linear(
        (ctypes.c_void_p * len(blocks))(*blocks),
        len(blocks),
        BITS[mode],
        inputs.data_ptr(),
        y.numel() // y.shape[-1],
        y.data_ptr(),
    )
    _native.check(status, "linears")
    return y.to(x.dtype)


def _table(tensors: Sequence[Tensor], widths: Sequence[int]) -> Any:
    """An array of structs, one an expert; widths[e] columns are wanted of expert e."""
    structs = []
    for e, width in enumerate(widths):
        q_weight, q_scale, q_scale_max, q_groups, q_invperm = tensors[5 * e : 5 * e + 5]
        structs.append(describe_linear(q_weight, q_scale, q_scale_max, q_groups, q_invperm, None, width))
    return (_abi.Linear * len(structs))(*structs)


def _expert_tables(
    gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor], x: Tensor
) -> tuple[Any, Any, Any]:
    """Arrays of E structs for gate, up and down, checked and built once for the same memory.

    For 16 experts that costs 0.3 ms, more than a decode step of small experts: hence the cache. Its key
    holds the place and size of every tensor and the shape of every matrix: no table is used for other memory.
    """
    lists = (*gate, *up, *down)
    shapes = [tensor.shape for tensor in lists[::5]]
    key = (x.shape[1], *map(Tensor.data_ptr, lists), *map(Tensor.numel, lists), *shapes)
    tables = _experts_cache.get(key)
    if tables is None:
        checks.expert_linears(x, gate, up, down)
        hidden = x.shape[1]
        ffn = [down[5 * e + 4].shape[0] for e in range(len(down) // 5)]
        tables = (_table(gate, ffn), _table(up, ffn), _table(down, [hidden] * len(ffn)))
        if len(_experts_cache) >= _EXPERTS_CACHE_LIMIT:
            _experts_cache.clear()
        _experts_cache[key] = tables
    return tables


def repacked_experts(
    gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor], x: Tensor
) -> Repacked | None:
    """The repacked linears of all experts: every gate, then every up, then every down."""

    def describe() -> list[_abi.Linear]:
        return [struct for table in _expert_tables(gate, up, down, x) for struct in table]

    return repacked((*gate, *up, *down), (x.shape[1],), describe)


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in x's dtype; lists hold five tensors an expert."""
    if not _native_ready():
        checks.expert_linears(x, gate, up, down)
        return reference.experts(x, top_k_index, top_k_weights, gate, up, down, activation)
    tokens, hidden = x.shape
    inputs, weights = _floats(x), _floats(top_k_weights)
    index = top_k_index.to(torch.int64).contiguous()
    y = torch.empty(tokens, hidden, dtype=torch.float32)
    mode = activations()
    fast = None if mode == "float" else repacked_experts(gate, up, down, x)
    if fast is not None:
        status = _native.library().dbrxq_packed_experts(
            fast.pointers,
            len(gate) // 5,
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
        _native.check(status, "experts")
        return y.to(x.dtype)
    tables = _expert_tables(gate, up, down, x)
    status = _native.library().dbrxq_experts_forward(
        inputs.data_ptr(),
        index.data_ptr(),
        weights.data_ptr(),
        tokens,
        hidden,
        index.shape[1],
        len(gate) // 5,
        *tables,
        _abi.ACTIVATIONS[activation],
        y.data_ptr(),
    )
    _native.check(status, "experts")
    return y.to(x.dtype)
