"""What every backend relies on before it reads memory: dtypes, shapes, layout and device of the arguments.

Axes: T tokens, K input channels, N output channels as stored, E experts, D hidden, A experts per token.

Sizes may be symbolic while a graph is traced. The group table and the permutation are data, not shape: the
native library checks them itself, and `format.validate_linear` does when a file is opened.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import TENSORS
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.library._abi import ACTIVATIONS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILED_ON = ("cuda", "meta")  # types of devices where a q_weight may be tiled, cuda_tiles.py


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


def stored_linear(
    name: str, stored: Stored, bias: Tensor | None, out_features: int, device: torch.device
) -> None:
    """Check one linear."""
    tiled = stored.tiled
    if tiled and device.type not in _TILED_ON:
        raise ValueError(
            f"{name}.q_weight: {tuple(stored.q_weight.shape)} is the layout of the CUDA kernels, but on "
            f"{device}; move the module with .to(), or take its state_dict()"
        )
    for (suffix, (dtype, dimensions)), tensor in zip(TENSORS.items(), (*stored, bias), strict=True):
        if tensor is None:
            continue
        allowed = 3 if tiled and suffix == "q_weight" else dimensions
        if tensor.dtype != dtype or tensor.dim() != allowed:
            raise ValueError(
                f"{name}.{suffix}: {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {dtype} in {dimensions} dimensions"
            )
        if tensor.device != device:
            raise ValueError(f"{name}.{suffix}: on {tensor.device}, expected {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{suffix}: not contiguous; pass a contiguous copy")
    _, q_scale, q_scale_max, q_groups, _ = stored
    n, g = stored.n, q_scale_max.shape[0]
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


def linear_call(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> None:
    """Check the arguments of `linear`."""
    stored_linear("linear", stored, bias, out_features, x.device)
    linear_input(x, stored)


def linear_input(x: Tensor, stored: Stored) -> None:
    """Check the input of `linear` against a linear that is checked already."""
    _require_floats("linear: x", x)
    if x.dim() < 1:
        raise ValueError("linear: x is a scalar, expected [..., K]")
    fits = x.shape[-1] == stored.k
    if fits is not True:  # asked here as well: for small linears a call counts
        require(fits, lambda: f"linear: x has {x.shape[-1]} channels, the weight {stored.k}")


def each_linear(
    tensors: Sequence[Tensor], biases: Sequence[Tensor | None], out_features: Sequence[int]
) -> list[tuple[Stored, Tensor | None, int]]:
    """The arguments of `linear` other than x, for each linear of `linears`."""
    count = len(out_features)
    if not count or len(tensors) != 5 * count or len(biases) != count:
        raise ValueError(
            f"linears: {len(tensors)} tensors, {len(biases)} biases and {count} widths; "
            "expected 5 tensors, a bias or None and a width for each linear, of one or more"
        )
    linears = StoredList(tensors)
    return [(linears[i], biases[i], out_features[i]) for i in range(count)]


def experts_call(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: StoredList,
    up: StoredList,
    down: StoredList,
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
    counts = [len(linears.tensors) for linears in (gate, up, down)]
    if not counts[0] or counts[0] % 5 or len(set(counts)) > 1:
        raise ValueError(
            f"experts: {counts[0]}, {counts[1]} and {counts[2]} tensors of gate, up and down; "
            "expected 5 an expert"
        )
    for tensor in (top_k_index, top_k_weights):
        if tensor.device != x.device:
            raise ValueError(f"experts: routing on {tensor.device}, the input is on {x.device}")
    shape, other, tokens = top_k_index.shape, top_k_weights.shape, x.shape[0]
    require(shape[0] == tokens, lambda: f"experts: routing of {shape[0]} tokens for {tokens}")
    require(other[0] == tokens, lambda: f"experts: weights of {other[0]} tokens for {tokens}")
    require(other[1] == shape[1], lambda: f"experts: {other[1]} weights a token for {shape[1]} experts")


def expert_linears(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> None:
    """Check every linear of every expert against x [T, D] and against each other."""
    hidden = x.shape[1]
    for expert, (own_gate, own_up, own_down) in enumerate(zip(gate, up, down, strict=True)):
        ffn = own_down.k
        for role, stored, inputs, outputs in (
            ("gate", own_gate, hidden, ffn),
            ("up", own_up, hidden, ffn),
            ("down", own_down, ffn, hidden),
        ):
            name = f"experts: expert {expert} {role}"
            stored_linear(name, stored, None, outputs, x.device)
            if stored.k != inputs:
                raise ValueError(f"{name}: {stored.k} input channels, expected {inputs}")
