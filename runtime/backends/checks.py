"""What every backend relies on before it reads memory: dtypes, shapes, layout and device of the arguments.

Axes: T tokens, K input channels, N output channels as stored, E experts, D hidden, A experts per token.

Sizes may be symbolic while a graph is traced. The group table and the permutation are data, not shape: the
native library checks them itself, and `format.validate_linear` does when a file is opened.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime._abi import ACTIVATIONS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILED_ON = ("cuda", "meta")  # types of devices where a q_weight may be tiled, cuda_layout.py
_STORED = (
    ("q_weight", torch.int32, 2),
    ("q_scale", torch.int32, 2),
    ("q_scale_max", torch.float16, 1),
    ("q_groups", torch.int16, 1),
    ("q_invperm", torch.int32, 1),
    ("bias", torch.float16, 1),
)


def require(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError unless the condition holds; a symbolic one becomes a guard of the traced graph."""
    if condition is True:
        return
    if condition is False:
        raise ValueError(message())
    torch._check_value(condition, message)  # type: ignore[no-untyped-call]


def _require_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: {tensor.dtype}, expected float32, bfloat16 or float16")


def stored_columns(q_weight: Tensor) -> int:
    """N of a linear, from its q_weight: [R, N] as in the file, or tiled, [word rows, N / 4, 4]."""
    return q_weight.shape[1] * (q_weight.shape[2] if q_weight.dim() == 3 else 1)


def stored_linear(
    name: str, tensors: Sequence[Tensor | None], out_features: int, device: torch.device
) -> None:
    """Check one linear: (q_weight, q_scale, q_scale_max, q_groups, q_invperm) and perhaps (bias or None)."""
    for (suffix, dtype, dimensions), tensor in zip(_STORED, tensors, strict=False):
        if tensor is None:
            continue
        tiled = suffix == "q_weight" and tensor.dim() == 3
        if tiled and device.type not in _TILED_ON:
            raise ValueError(
                f"{name}.q_weight: {tuple(tensor.shape)} is the layout of the CUDA kernels, but on {device}; "
                "move the module with .to(), or take its state_dict()"
            )
        if tensor.dtype != dtype or (tensor.dim() != dimensions and not tiled):
            raise ValueError(
                f"{name}.{suffix}: {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {dtype} in {dimensions} dimensions"
            )
        if tensor.device != device:
            raise ValueError(f"{name}.{suffix}: on {tensor.device}, expected {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{suffix}: not contiguous; pass a contiguous copy")
    q_weight, q_scale, q_scale_max, q_groups = tensors[:4]
    bias = tensors[5] if len(tensors) > 5 else None
    assert q_weight is not None
    assert q_scale is not None
    assert q_scale_max is not None
    assert q_groups is not None
    n, g = stored_columns(q_weight), q_scale_max.shape[0]
    require(n % 32 == 0, lambda: f"{name}.q_weight: {n} columns, expected a multiple of 32")
    require(q_scale.shape[0] == g, lambda: f"{name}.q_scale: {q_scale.shape[0]} rows for {g} groups")
    require(q_scale.shape[1] * 8 == n, lambda: f"{name}.q_scale: {q_scale.shape[1]} words for {n} columns")
    require(
        q_groups.shape[0] == 2 * g, lambda: f"{name}.q_groups: {q_groups.shape[0]} entries for {g} groups"
    )
    require(out_features >= 1, lambda: f"{name}: {out_features} output features")
    require(out_features <= n, lambda: f"{name}: {out_features} output features of {n} stored columns")
    if bias is not None:
        require(bias.shape[0] == n, lambda: f"{name}.bias: {bias.shape[0]} entries for {n} columns")


def linear_call(x: Tensor, tensors: Sequence[Tensor | None], out_features: int) -> None:
    """Check the arguments of `linear`."""
    stored_linear("linear", tensors, out_features, x.device)
    q_invperm = tensors[4]
    assert q_invperm is not None
    linear_input(x, q_invperm)


def linear_input(x: Tensor, q_invperm: Tensor) -> None:
    """Check the input of `linear` against a linear that is checked already."""
    _require_floats("linear: x", x)
    if x.dim() < 1:
        raise ValueError("linear: x is a scalar, expected [..., K]")
    k, found = q_invperm.shape[0], x.shape[-1]
    require(found == k, lambda: f"linear: x has {found} channels, the weight {k}")


def each_linear(
    stored: Sequence[Tensor], biases: Sequence[Tensor | None], out_features: Sequence[int]
) -> list[tuple[Any, ...]]:
    """The arguments of `linear`, but for x, of each of the linears of `linears`."""
    count = len(out_features)
    if not count or len(stored) != 5 * count or len(biases) != count:
        raise ValueError(
            f"linears: {len(stored)} tensors, {len(biases)} biases and {count} widths; "
            "expected 5 tensors, a bias or None and a width for each linear, of one or more"
        )
    return [(*stored[5 * i : 5 * i + 5], biases[i], out_features[i]) for i in range(count)]


def experts_call(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> None:
    """Check the arguments of `experts`, except for the linears themselves."""
    _require_floats("experts: x", x)
    _require_floats("experts: top_k_weights", top_k_weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts: top_k_index is {top_k_index.dtype}, expected int64 or int32")
    if x.dim() != 2 or top_k_index.dim() != 2 or top_k_weights.dim() != 2:
        raise ValueError("experts: expected x [T, D], top_k_index [T, A] and top_k_weights [T, A]")
    if not gate or len(gate) % 5 or len(gate) != len(up) or len(gate) != len(down):
        raise ValueError(
            f"experts: {len(gate)}, {len(up)} and {len(down)} tensors of gate, up and down; "
            "expected 5 an expert"
        )
    for tensor in (top_k_index, top_k_weights):
        if tensor.device != x.device:
            raise ValueError(f"experts: routing on {tensor.device}, the input is on {x.device}")
    shape, other, tokens = top_k_index.shape, top_k_weights.shape, x.shape[0]
    require(shape[0] == tokens, lambda: f"experts: routing of {shape[0]} tokens for {tokens}")
    require(other[0] == tokens, lambda: f"experts: weights of {other[0]} tokens for {tokens}")
    require(other[1] == shape[1], lambda: f"experts: {other[1]} weights a token for {shape[1]} experts")


def expert_linears(x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> None:
    """Check every linear of every expert against x [T, D] and against each other."""
    hidden = x.shape[1]
    for expert in range(len(gate) // 5):
        own = slice(5 * expert, 5 * expert + 5)
        ffn = down[own][4].shape[0]
        for role, tensors, inputs, outputs in (
            ("gate", gate[own], hidden, ffn),
            ("up", up[own], hidden, ffn),
            ("down", down[own], ffn, hidden),
        ):
            name = f"experts: expert {expert} {role}"
            stored_linear(name, tensors, outputs, x.device)
            if tensors[4].shape[0] != inputs:
                raise ValueError(f"{name}: {tensors[4].shape[0]} input channels, expected {inputs}")
