"""The operators `dbrxq::dequantize`, `dbrxq::linear` and `dbrxq::experts`: schemas, checks, fakes, backends.

Axes: T tokens, K input channels, N output channels as stored, E experts, D hidden, A experts per token.

A linear is passed as its stored tensors (q_weight, q_scale, q_scale_max, q_groups, q_invperm) and, for `linear`,
an optional bias; a list of experts as 5 E tensors, expert after expert. Stored N may be padded: `out_features`
says how many columns are wanted. Activations may be fp32, bf16 or fp16; sums are in fp32, results in x's dtype.

CPU tensors go to the native library (`backends/cpu.py`), all others to plain torch (`backends/reference.py`).
The operators have no gradient: they run with tensors that require one, and `backward()` through them raises.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.backends import cpu, reference
from dbrx_quant.runtime.format import SUFFIXES

ACTIVATIONS = tuple(reference.ACTIVATIONS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WORDS = "Tensor q_weight, Tensor q_scale, Tensor q_scale_max, Tensor q_groups, Tensor q_invperm"

_library = torch.library.Library("dbrxq", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"dequantize({_WORDS}, int out_features) -> Tensor", tags=_tags)
_library.define(f"linear(Tensor x, {_WORDS}, Tensor? bias, int out_features) -> Tensor", tags=_tags)
_library.define(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "str activation) -> Tensor",
    tags=_tags,
)


def _require(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError, or note the condition while tracing with symbolic sizes."""
    if condition is True:
        return
    if condition is False:
        raise ValueError(message())
    torch._check_value(condition, message)


def _check_linear(
    name: str,
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    bias: Tensor | None,
    out_features: int,
    device: torch.device,
) -> None:
    """Dtypes, shapes, memory layout and device of one linear: all that reading its memory relies on."""
    tensors = [
        (q_weight, "q_weight", torch.int32, 2),
        (q_scale, "q_scale", torch.int32, 2),
        (q_scale_max, "q_scale_max", torch.float16, 1),
        (q_groups, "q_groups", torch.int16, 1),
        (q_invperm, "q_invperm", torch.int32, 1),
    ]
    if bias is not None:
        tensors.append((bias, "bias", torch.float16, 1))
    for tensor, suffix, dtype, dimensions in tensors:
        if tensor.dtype != dtype or tensor.dim() != dimensions:
            raise ValueError(
                f"{name}.{suffix}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} in {dimensions} dimensions"
            )
        if tensor.device != device:
            raise ValueError(f"{name}.{suffix}: on {tensor.device}, the input is on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{suffix}: not contiguous; pass a contiguous copy")
    n, groups = q_weight.shape[1], q_scale_max.shape[0]
    _require(n % 32 == 0, lambda: f"{name}.q_weight: {n} columns, expected a multiple of 32")
    _require(
        q_scale.shape[0] == groups, lambda: f"{name}.q_scale: {q_scale.shape[0]} rows for {groups} groups"
    )
    _require(
        q_scale.shape[1] * 8 == n, lambda: f"{name}.q_scale: {q_scale.shape[1]} words a row for {n} columns"
    )
    _require(
        q_groups.shape[0] == 2 * groups,
        lambda: f"{name}.q_groups: {q_groups.shape[0]} entries, expected {2 * groups} for {groups} groups",
    )
    _require(out_features >= 1, lambda: f"{name}: {out_features} output features")
    _require(out_features <= n, lambda: f"{name}: {out_features} output features of {n} stored columns")
    if bias is not None:
        _require(bias.shape[0] == n, lambda: f"{name}.bias: {bias.shape[0]} entries, expected {n}")


def _check_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: {tensor.dtype}, expected float32, bfloat16 or float16")


def _check_linear_call(x: Tensor, *linear: Any) -> None:
    _check_floats("linear: x", x)
    if x.dim() < 1:
        raise ValueError("linear: x is a scalar, expected [..., K]")
    _check_linear("linear", *linear, device=x.device)
    k = linear[4].shape[0]
    _require(x.shape[-1] == k, lambda: f"linear: x has {x.shape[-1]} channels, the weight {k}")


def _check_experts_call(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> None:
    _check_floats("experts: x", x)
    _check_floats("experts: top_k_weights", top_k_weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts: top_k_index is {top_k_index.dtype}, expected int64 or int32")
    if x.dim() != 2 or top_k_index.dim() != 2 or top_k_weights.dim() != 2:
        raise ValueError("experts: expected x [T, D], top_k_index [T, A] and top_k_weights [T, A]")
    if not gate or len(gate) % 5 or len(gate) != len(up) or len(gate) != len(down):
        raise ValueError(
            f"experts: {len(gate)}, {len(up)} and {len(down)} tensors of gate, up and down; expected 5 an expert"
        )
    _require(
        top_k_index.shape[0] == x.shape[0],
        lambda: f"experts: routing of {top_k_index.shape[0]} tokens for {x.shape[0]}",
    )
    for axis in range(2):
        _require(
            top_k_weights.shape[axis] == top_k_index.shape[axis],
            lambda: f"experts: top_k_weights {tuple(top_k_weights.shape)}, index {tuple(top_k_index.shape)}",
        )
    for tensor in (top_k_index, top_k_weights):
        if tensor.device != x.device:
            raise ValueError(f"experts: routing on {tensor.device}, the input is on {x.device}")


def _check_expert_linears(
    x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]
) -> None:
    hidden = x.shape[1]
    for e in range(len(gate) // 5):
        own = slice(5 * e, 5 * e + 5)
        ffn = down[own][4].shape[0]
        for role, tensors, inputs, outputs in (
            ("gate", gate[own], hidden, ffn),
            ("up", up[own], hidden, ffn),
            ("down", down[own], ffn, hidden),
        ):
            name = f"experts: expert {e} {role}"
            q_weight, q_scale, q_scale_max, q_groups, q_invperm = tensors
            _check_linear(
                name, q_weight, q_scale, q_scale_max, q_groups, q_invperm, None, outputs, device=x.device
            )
            found = q_invperm.shape[0]
            _require(
                found == inputs, lambda n=name, f=found, i=inputs: f"{n}: {f} input channels, expected {i}"
            )


# ---- Kernels as the dispatcher calls them ------------------------------------------------------------------------


def _dequantize_with(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*linear: Any) -> Tensor:
        _check_linear("dequantize", *linear[:5], None, linear[5], device=linear[0].device)
        return kernel(*linear)

    return run


def _linear_with(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *linear: Any) -> Tensor:
        _check_linear_call(x, *linear)
        return kernel(x, *linear)

    return run


def _experts_with(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *arguments: Any) -> Tensor:
        _check_experts_call(x, *arguments)
        _check_expert_linears(x, *arguments[2:5])
        return kernel(x, *arguments)

    return run


def _fake_dequantize(q_weight: Tensor, *rest: Any) -> Tensor:
    return q_weight.new_empty(rest[3].shape[0], rest[4], dtype=torch.float16)


def _fake_linear(x: Tensor, *linear: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], linear[-1])


def _fake_experts(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


for _name, _with, _fake in (
    ("dequantize", _dequantize_with, _fake_dequantize),
    ("linear", _linear_with, _fake_linear),
    ("experts", _experts_with, _fake_experts),
):
    _library.impl(_name, _with(getattr(reference, _name)), "CompositeExplicitAutograd")
    _library.impl(_name, _with(getattr(cpu, _name)), "CPU")
    torch.library.register_fake(f"dbrxq::{_name}", _with(_fake), lib=_library)


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "dbrxq operators are for inference and have no gradient; run the model under torch.no_grad()"
    )


for _name in ("linear", "experts"):
    torch.library.register_autograd(f"dbrxq::{_name}", _no_gradient, lib=_library)


# The overloads themselves: one look-up less per call than torch.ops.dbrxq.<name>.
dequantize_op = torch.ops.dbrxq.dequantize.default
linear_op = torch.ops.dbrxq.linear.default
experts_op = torch.ops.dbrxq.experts.default


# ---- What Python code calls --------------------------------------------------------------------------------------


def dequantize(tensors: Mapping[str, Tensor], out_features: int | None = None) -> Tensor:
    """The exact fp16 weight [N, K] (out, in) of a linear, from its tensors keyed by suffix.

    The memory behind it is [K, N]: the result is a transposed view. Without `out_features` all stored columns come.
    """
    width = tensors["q_weight"].shape[1] if out_features is None else out_features
    weight: Tensor = dequantize_op(*(tensors[suffix] for suffix in SUFFIXES), width)
    return weight.t()


def linear(x: Tensor, tensors: Mapping[str, Tensor], out_features: int | None = None) -> Tensor:
    """y [..., out_features] from x [..., K] and the tensors of a linear (with `bias`, if it has one) by suffix."""
    width = tensors["q_weight"].shape[1] if out_features is None else out_features
    stored = (tensors[suffix] for suffix in SUFFIXES)
    y: Tensor = linear_op(x, *stored, tensors.get("bias"), width)
    return y


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Sequence[Mapping[str, Tensor]],
    up: Sequence[Mapping[str, Tensor]],
    down: Sequence[Mapping[str, Tensor]],
    activation: str = "silu",
) -> Tensor:
    """y [T, D]: sum over a of top_k_weights[t, a] * down(activation(gate(x_t)) * up(x_t)) of expert top_k_index[t, a].

    Args:
        x: [T, D].
        top_k_index: [T, A] int64; the number of experts itself means "no expert" and adds nothing.
        top_k_weights: [T, A].
        gate: one mapping of suffix to tensor per expert; likewise up and down.
        up: as gate.
        down: as gate.
        activation: one of ACTIVATIONS.
    """
    lists = ([linear[suffix] for linear in linears for suffix in SUFFIXES] for linears in (gate, up, down))
    y: Tensor = experts_op(x, top_k_index, top_k_weights, *lists, activation)
    return y
