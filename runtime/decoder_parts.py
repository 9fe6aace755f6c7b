"""Which module of a transformers decoder plays which role, for the families whose layers run natively.

Only plain layers are recognised: a module of any other class, such as an adapter's, makes a layer unknown.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dbrx_quant.runtime.experts import QuantExperts, activation_name
from dbrx_quant.runtime.linear import FusedLinear, QuantLinear


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
    qkv: tuple[QuantLinear, ...]
    output: QuantLinear
    mlp: tuple[QuantLinear, ...] | None
    experts: QuantExperts | None
    router: Tensor | None
    active: int
    expert_norm: float
    eps: float
    head_dim: int
    scale: float
    clip: float
    layer_norm: bool
    activation: str


class _Unknown(Exception):
    """The layer is not one that runs natively."""


def _of_class(module: Any, *names: str) -> Any:
    """The module, if it is of a class of that name."""
    if type(module).__name__ not in names:
        raise _Unknown
    return module


def _linears(*modules: Any) -> tuple[QuantLinear, ...]:
    return tuple(_of_class(module, QuantLinear.__name__) for module in modules)


def _llama_like(prefix: str, layer: Any, config: Any) -> LayerParts:
    _of_class(layer, f"{prefix}DecoderLayer")
    attention = _of_class(layer.self_attn, f"{prefix}Attention")
    norms = [
        _of_class(m, f"{prefix}RMSNorm") for m in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    heads = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    norms += [_of_class(m, f"{prefix}RMSNorm") for m in heads]
    mlp = experts = router = None
    active, expert_norm, activation = 0, 0.0, activation_name(config.hidden_act)
    if hasattr(layer.mlp, "experts"):
        _of_class(layer.mlp, f"{prefix}SparseMoeBlock")
        gate = _of_class(layer.mlp.gate, f"{prefix}TopKRouter")
        experts, router = _of_class(layer.mlp.experts, QuantExperts.__name__), gate.weight
        active, expert_norm = gate.top_k, float(getattr(gate, "norm_topk_prob", True))
        activation = experts.activation
    else:
        dense = _of_class(layer.mlp, f"{prefix}MLP")
        mlp = _linears(dense.gate_proj, dense.up_proj, dense.down_proj)
    if len({norm.variance_epsilon for norm in norms}) != 1:
        raise _Unknown
    return LayerParts(
        norms=(norms[0].weight, norms[1].weight),
        head_norms=(norms[2].weight, norms[3].weight) if heads else None,
        qkv=_linears(attention.q_proj, attention.k_proj, attention.v_proj),
        output=_linears(attention.o_proj)[0],
        mlp=mlp,
        experts=experts,
        router=router,
        active=active,
        expert_norm=expert_norm,
        eps=norms[0].variance_epsilon,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        clip=float("inf"),
        layer_norm=False,
        activation=activation,
    )


def _dbrx(layer: Any, config: Any) -> LayerParts:
    _of_class(layer, "DbrxBlock")
    outer, ffn = _of_class(layer.norm_attn_norm, "DbrxNormAttentionNorm"), _of_class(layer.ffn, "DbrxFFN")
    attention = _of_class(outer.attn, "DbrxAttention")
    norms = [_of_class(norm, "LayerNorm") for norm in (outer.norm_1, outer.norm_2)]
    if norms[0].eps != norms[1].eps or any(norm.bias is not None for norm in norms):
        raise _Unknown
    experts = _of_class(ffn.experts, QuantExperts.__name__)
    router = _of_class(_of_class(ffn.router, "DbrxRouter").layer, "Linear")
    return LayerParts(
        norms=(norms[0].weight, norms[1].weight),
        head_norms=None,
        qkv=_linears(*_of_class(attention.Wqkv, FusedLinear.__name__).children()),
        output=_linears(attention.out_proj)[0],
        mlp=None,
        experts=experts,
        router=router.weight,
        active=ffn.top_k,
        expert_norm=float(ffn.moe_normalize_expert_weights or 0.0),
        eps=norms[0].eps,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        clip=float("inf") if attention.clip_qkv is None else float(attention.clip_qkv),
        layer_norm=True,
        activation=experts.activation,
    )


_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe")


def layer_parts(model: Any) -> tuple[list[LayerParts], Tensor] | None:
    """The parts of every layer of a decoder (the model below its head), and the weight of its last norm.

    None where the model, or any layer, is none that is known here.
    """
    config = model.config
    if getattr(config, "sliding_window", None) is not None:
        return None
    kind = type(model).__name__.removesuffix("Model")
    try:
        if kind == "Dbrx":
            parts = [_dbrx(layer, config) for layer in model.blocks[: config.num_hidden_layers]]
            last, eps = _of_class(model.norm_f, "LayerNorm"), model.norm_f.eps
        elif kind in _LLAMA_LIKE:
            parts = [_llama_like(kind, layer, config) for layer in model.layers[: config.num_hidden_layers]]
            last, eps = _of_class(model.norm, f"{kind}RMSNorm"), model.norm.variance_epsilon
        else:
            return None
    except (_Unknown, ValueError):  # ValueError: an activation that the operators don't have
        return None
    if not parts or parts[0].eps != eps or getattr(last, "bias", None) is not None:
        return None
    shared = {(p.eps, p.head_dim, p.scale, p.clip, p.layer_norm, p.activation) for p in parts}
    return (parts, last.weight) if len(shared) == 1 else None
