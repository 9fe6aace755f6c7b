"""The operators `dbrxq::dequantize`, `linear`, `linears` and `experts`: schemas, fakes, backends.

Axes: T tokens, K input channels, N output channels as stored, E experts, D hidden, A experts per token.

A linear is passed as its stored tensors (q_weight, q_scale, q_scale_max, q_groups, q_invperm) and, for
`linear`, an optional bias; lists of linears as five tensors each, one linear after the other. Stored N may
be padded: `out_features` says how many columns to compute. On a GPU q_weight may come *tiled*, as
`QuantLinear` keeps it there (`kernels/cuda_tiles.py`), and has three dimensions then. Activations may be
fp32, bf16 or fp16; sums are in fp32, results in the activations' dtype.

CPU and CUDA tensors go to the native libraries (`kernels/cpu.py`, `kernels/cuda.py`), all others to plain
torch (`kernels/reference.py`).
The operators have no gradient: they run with tensors that require one, and `backward()` through them raises.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import validate_linear
from dbrx_quant.runtime.kernels import checks, cpu, cuda, fake, reference
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.library import _abi

ACTIVATIONS = tuple(_abi.ACTIVATIONS)

_STORED = ", ".join(f"Tensor {suffix}" for suffix in Stored._fields)
_SCHEMAS = (
    f"dequantize({_STORED}, int out_features) -> Tensor",
    f"linear(Tensor x, {_STORED}, Tensor? bias, int out_features) -> Tensor",
    "linears(Tensor x, Tensor[] stored, Tensor?[] biases, int[] out_features) -> Tensor",
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "str activation) -> Tensor",
)


def kernels(backend: ModuleType) -> dict[str, Callable[..., Tensor]]:
    """The backend's functions behind the checks, as the dispatcher calls them: loose tensors, by position.

    `cpu.linear` checks for itself, and only once what stays the same: for small linears that saves a fifth of
    the call. Only there do linears of the same input share its rounding; elsewhere they run one by one.
    """

    def checked_linear(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> Tensor:
        checks.linear_call(x, stored, bias, out_features)
        result: Tensor = backend.linear(x, stored, bias, out_features)
        return result

    def one_by_one(x: Tensor, each: Sequence[tuple[Stored, Tensor | None, int]]) -> Tensor:
        return torch.cat([checked_linear(x, *one) for one in each], dim=-1)

    one, several = (cpu.linear, cpu.linears) if backend is cpu else (checked_linear, one_by_one)

    def dequantize(*arguments: Any) -> Tensor:
        stored, out_features = Stored(*arguments[:5]), arguments[5]
        checks.stored_linear("dequantize", stored, None, out_features, stored.q_weight.device)
        result: Tensor = backend.dequantize(stored, out_features)
        return result

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
        return one(x, Stored(q_weight, q_scale, q_scale_max, q_groups, q_invperm), bias, out_features)

    def linears(x: Tensor, *lists: Any) -> Tensor:
        return several(x, checks.each_linear(*lists))

    def experts(*arguments: Any) -> Tensor:
        x, top_k_index, top_k_weights, gate, up, down, activation = arguments
        lists = StoredList(gate), StoredList(up), StoredList(down)
        checks.experts_call(x, top_k_index, top_k_weights, *lists, activation)
        result: Tensor = backend.experts(x, top_k_index, top_k_weights, *lists, activation)
        return result

    return {"dequantize": dequantize, "linear": linear, "linears": linears, "experts": experts}


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("dbrxq operators are for inference and have no gradient; use torch.no_grad()")


_library: Any = torch.library.Library("dbrxq", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _key, _backend in (("CompositeExplicitAutograd", reference), ("CPU", cpu), ("CUDA", cuda)):
    for _name, _kernel in kernels(_backend).items():
        _library.impl(_name, _kernel, _key)
for _name, _kernel in kernels(fake).items():
    torch.library.register_fake(f"dbrxq::{_name}", _kernel, lib=_library)
for _name in ("linear", "linears", "experts"):
    torch.library.register_autograd(f"dbrxq::{_name}", _no_gradient, lib=_library)

# The overloads themselves: one look-up less per call than torch.ops.dbrxq.<name>.
dequantize_op = torch.ops.dbrxq.dequantize.default
linear_op = torch.ops.dbrxq.linear.default
linears_op = torch.ops.dbrxq.linears.default
experts_op = torch.ops.dbrxq.experts.default


def dequantize(tensors: Mapping[str, Tensor], out_features: int | None = None) -> Tensor:
    """The exact fp16 weight [N, K] (out, in) of a linear, from its tensors keyed by suffix.

    The memory behind it is [K, N]: the result is a transposed view. All stored columns come by default.

    Raises:
        ValueError: the tensors break a rule of the format (on a GPU, only what kernels rely on is checked).
    """
    devices = {tensor.device for tensor in tensors.values() if isinstance(tensor, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"dequantize: tensors on {' and '.join(map(str, devices))}, expected one device")
    if devices <= {torch.device("cpu")}:
        validate_linear(tensors, "dequantize")
    stored = Stored(*(tensor.contiguous() for tensor in Stored.of(tensors)))
    weight: Tensor = dequantize_op(*stored, stored.n if out_features is None else out_features)
    return weight.t()


def linear(x: Tensor, tensors: Mapping[str, Tensor], out_features: int | None = None) -> Tensor:
    """The product [..., out_features] of x [..., K] and a linear, given by its tensors keyed by suffix.

    A `bias` among them is added. All stored columns come by default.
    """
    stored = Stored.of(tensors)
    width = stored.n if out_features is None else out_features
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
    """The weighted sum over each token's experts of down(activation(gate(x)) * up(x)), [T, D].

    Args:
        x: [T, D].
        top_k_index: [T, A] int64; the number of experts itself means "no expert" and adds nothing.
        top_k_weights: [T, A].
        gate: the tensors of each expert's gate, keyed by suffix; likewise up and down.
        up: as gate.
        down: as gate.
        activation: one of ACTIVATIONS.
    """
    lists = (StoredList.of(linears).tensors for linears in (gate, up, down))
    y: Tensor = experts_op(x, top_k_index, top_k_weights, *lists, activation)
    return y
