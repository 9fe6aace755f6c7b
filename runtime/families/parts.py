"""What the native step needs from a transformers decoder: which module of a layer plays which role.

The families whose layers run natively say so in their `layer_parts`, with the helpers here. Only plain layers
are recognised: a module of any other class, such as an adapter's, makes a layer unknown.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dbrx_quant.runtime.model.experts import QuantExperts
    from dbrx_quant.runtime.model.linear import QuantLinear


# Attributes of transformers' modules that may change: the families' `layer_parts` read them, or the native
# step calls the module itself (rotations), or they only note something. Any other that changes leaves the
# model to transformers' own code.
ADOPTED = frozenset(
    (
        "eps",
        "variance_epsilon",
        "scaling",
        "clip_qkv",
        "top_k",
        "norm_topk_prob",
        "moe_normalize_expert_weights",
        "attention_scaling",
        "max_seq_len_cached",
        "_output_capturing_hooks_installed",
    )
)


@dataclass(frozen=True)
class LayerParts:
    """The modules and weights of one decoder layer.

    Attributes:
        norms: weights [D] of the norms before attention and before the MLP.
        head_norms: weights [head_dim] of the norms of queries and keys, or None.
        qkv: the linears of queries, keys and values.
        output: the linear behind the attention.
        mlp: gate, up and down, or None where there are experts.
        experts: the experts, or None.
        router: weight [E, D] of the router, or None.
        active: experts of a token.
        expert_norm: the weights of a token's experts are divided by their p-norm of this p; 0: they are not.
        eps: of every norm.
        head_dim: of queries, keys and values.
        scale: of the attention scores.
        clip: bound of queries, keys and values, infinity for none.
        layer_norm: LayerNorm instead of RMSNorm.
        activation: as the operators name it.
    """

    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    qkv: "tuple[QuantLinear, ...]"
    output: "QuantLinear"
    mlp: "tuple[QuantLinear, ...] | None"
    experts: "QuantExperts | None"
    router: Tensor | None
    active: int
    expert_norm: float
    eps: float
    head_dim: int
    scale: float
    clip: float
    layer_norm: bool
    activation: str


@dataclass(frozen=True)
class DecoderParts:
    """All layers of a decoder, and the weight [D] and epsilon of the norm behind them."""

    layers: list[LayerParts]
    last_norm: Tensor
    eps: float


class UnknownPartError(Exception):
    """The layer is not one that runs natively."""


def of_class(module: Any, *names: str) -> Any:
    """The module, if it is of a class of that name.

    Raises:
        UnknownPartError: it is of another.
    """
    if type(module).__name__ not in names:
        raise UnknownPartError
    return module


def is_quant_linear(module: Any) -> bool:
    """Whether a module is a quantized linear."""
    return type(module).__name__ == "QuantLinear"


def quant_linears(*modules: Any) -> "tuple[QuantLinear, ...]":
    """The modules, if they are quantized linears and nothing else.

    Raises:
        UnknownPartError: one is something else.
    """
    return tuple(of_class(module, "QuantLinear") for module in modules)


def fused_linears(module: Any) -> "tuple[QuantLinear, ...]":
    """The linears of a `FusedLinear`, if all are quantized.

    Raises:
        UnknownPartError: it is something else.
    """
    return quant_linears(*of_class(module, "FusedLinear").children())


def quant_experts(module: Any) -> "QuantExperts":
    """The module, if it is quantized experts.

    Raises:
        UnknownPartError: it is something else.
    """
    experts: QuantExperts = of_class(module, "QuantExperts")
    return experts
