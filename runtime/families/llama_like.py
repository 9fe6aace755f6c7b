"""What Llama and its relatives share: split attention, a gated MLP or experts in its place, RMS norms."""

from typing import Any

from dbrx_quant.runtime.families.facts import (
    Architecture,
    BlockSpec,
    ExpertsSpec,
    FloatSpec,
    LinearSpec,
    Source,
)
from dbrx_quant.runtime.families.family import Switch
from dbrx_quant.runtime.families.parts import (
    DecoderParts,
    LayerParts,
    UnknownPartError,
    of_class,
    quant_experts,
    quant_linears,
)
from dbrx_quant.runtime.kernels.activations import activation_name

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_BIAS = Switch("attention_bias", (*QKV, "self_attn.o_proj"))


def own_source(name: str) -> tuple[Source, ...]:
    """The usual place of a linear's weight: its own name."""
    return (Source(f"{name}.weight"),)


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention(
    config: Any, index: int, *, qkv_bias: bool = False, o_bias: bool = False
) -> tuple[tuple[LinearSpec, ...], ...]:
    """The stages q, k, v and o of a block."""
    key = f"model.layers.{index}.self_attn"
    hidden, head = config.hidden_size, head_dim(config)
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_key_value_heads,
        "v": config.num_key_value_heads,
    }

    def part(role: str, shape: tuple[int, int], bias: bool) -> LinearSpec:
        name = f"{key}.{role}_proj"
        return LinearSpec(name, role, name, None, shape, own_source(name), bias, index)

    inputs = tuple(part(role, (hidden, count * head), qkv_bias) for role, count in heads.items())
    return inputs, (part("o", (heads["q"] * head, hidden), o_bias),)


def dense_mlp(
    config: Any, index: int, ffn: int, bias: bool = False, *, place: str = "mlp", prefix: str = ""
) -> tuple[tuple[LinearSpec, ...], ...]:
    """The stages gate, up and down of a dense block; `prefix` goes before their roles."""
    key, hidden = f"model.layers.{index}.{place}", config.hidden_size

    def part(role: str, shape: tuple[int, int]) -> LinearSpec:
        name = f"{key}.{role}_proj"
        return LinearSpec(name, prefix + role, name, None, shape, own_source(name), bias, index)

    return (part("gate", (hidden, ffn)), part("up", (hidden, ffn))), (part("down", (ffn, hidden)),)


def is_sparse(config: Any, index: int) -> bool:
    """Whether a block has experts, by the rule of Qwen's mixtures."""
    chosen = index not in (config.mlp_only_layers or []) and (index + 1) % config.decoder_sparse_step == 0
    return chosen and config.num_experts > 0


def experts(
    config: Any, index: int, *, prefix: str, keys: tuple[str, str, str], count: int, ffn: int
) -> ExpertsSpec:
    """The experts of a block whose EXL2 keys are `model.layers.N.<prefix>.experts.E.<key>`."""
    key, hidden = f"model.layers.{index}.{prefix}.experts", config.hidden_size
    module = f"model.layers.{index}.mlp.experts"

    def part(expert: int, role: str, name: str, shape: tuple[int, int]) -> LinearSpec:
        full = f"{key}.{expert}.{name}"
        owner = f"{module}.{expert}.{name}"
        return LinearSpec(full, role, owner, None, shape, own_source(full), block=index, expert=expert)

    linears = tuple(
        (
            part(expert, "gate", keys[0], (hidden, ffn)),
            part(expert, "up", keys[1], (hidden, ffn)),
            part(expert, "down", keys[2], (ffn, hidden)),
        )
        for expert in range(count)
    )
    router = f"model.layers.{index}.mlp.gate"
    return ExpertsSpec(module, router, config.num_experts_per_tok, config.hidden_act, keys, linears)


def qwen_experts(config: Any, index: int) -> ExpertsSpec:
    """The experts of a block of Qwen's mixtures."""
    return experts(
        config,
        index,
        prefix="mlp",
        keys=("gate_proj", "up_proj", "down_proj"),
        count=config.num_experts,
        ffn=config.moe_intermediate_size,
    )


def block(
    config: Any,
    index: int,
    stages: tuple[tuple[LinearSpec, ...], ...],
    moe: ExpertsSpec | None = None,
    router_key: str = "",
    head_norms: bool = False,
) -> BlockSpec:
    """A block made of the given linears, with its norms and its router."""
    module, hidden = f"model.layers.{index}", config.hidden_size
    names = ["input_layernorm", "post_attention_layernorm"]
    floats = [FloatSpec(f"{module}.{n}.weight", f"{module}.{n}.weight", (hidden,)) for n in names]
    if head_norms:
        for part in ("q_norm", "k_norm"):
            name = f"{module}.self_attn.{part}.weight"
            floats.append(FloatSpec(name, name, (head_dim(config),)))
    if moe:
        floats.append(FloatSpec(f"{module}.{router_key}.weight", f"{moe.router}.weight", (moe.count, hidden)))
    return BlockSpec(index, module, f"{module}.mlp", stages, moe, tuple(floats))


def model(config: Any, family: str, blocks: tuple[BlockSpec, ...]) -> Architecture:
    """A model of the given blocks, with embedding, final norm and head."""
    hidden, vocabulary, tied = config.hidden_size, config.vocab_size, bool(config.tie_word_embeddings)
    embedding = "model.embed_tokens.weight"
    head = (Source(embedding if tied else "lm_head.weight"),)
    return Architecture(
        family,
        hidden,
        vocabulary,
        blocks,
        (
            FloatSpec(embedding, embedding, (vocabulary, hidden)),
            FloatSpec("model.norm.weight", "model.norm.weight", (hidden,)),
        ),
        LinearSpec("lm_head", "head", "lm_head", None, (hidden, vocabulary), head),
        tied,
        (),
    )


def layer_parts(model: Any) -> DecoderParts:
    """The parts of a decoder whose classes are called as in transformers' Llama, under another first name."""
    prefix = type(model).__name__.removesuffix("Model")
    layers = model.layers[: model.config.num_hidden_layers]
    last = of_class(model.norm, f"{prefix}RMSNorm")
    parts = [_parts_of_layer(prefix, layer, model.config) for layer in layers]
    return DecoderParts(parts, last.weight, last.variance_epsilon)


def _parts_of_layer(prefix: str, layer: Any, config: Any) -> LayerParts:
    from transformers.activations import ACT2FN

    of_class(layer, f"{prefix}DecoderLayer")
    attention = of_class(layer.self_attn, f"{prefix}Attention")
    norms = [of_class(m, f"{prefix}RMSNorm") for m in (layer.input_layernorm, layer.post_attention_layernorm)]
    heads = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    norms += [of_class(m, f"{prefix}RMSNorm") for m in heads]
    mlp = experts = router = None
    active, expert_norm = 0, 0.0
    if hasattr(layer.mlp, "experts"):
        block = of_class(layer.mlp, f"{prefix}SparseMoeBlock")
        if {name for name, _ in block.named_children()} != {"gate", "experts"}:  # such as a shared expert
            raise UnknownPartError
        gate = of_class(layer.mlp.gate, f"{prefix}TopKRouter")
        experts, router = quant_experts(layer.mlp.experts), gate.weight
        active, expert_norm = gate.top_k, 1.0 if getattr(gate, "norm_topk_prob", True) else 0.0
        activation = experts.activation
    else:
        dense = of_class(layer.mlp, f"{prefix}MLP")
        mlp = quant_linears(dense.gate_proj, dense.up_proj, dense.down_proj)
        activation = activation_name(config.hidden_act)
        if type(dense.act_fn) is not type(ACT2FN[config.hidden_act]):  # one of the two was changed
            raise UnknownPartError
    if len({norm.variance_epsilon for norm in norms}) != 1:
        raise UnknownPartError
    return LayerParts(
        norms=(norms[0].weight, norms[1].weight),
        head_norms=(norms[2].weight, norms[3].weight) if heads else None,
        qkv=quant_linears(attention.q_proj, attention.k_proj, attention.v_proj),
        output=quant_linears(attention.o_proj)[0],
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
