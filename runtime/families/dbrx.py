"""DBRX: fused query-key-value, and 16 experts fused into three tensors a block.

In the fused tensors expert e owns the rows [e F, (e+1) F). Its w1 and v1 rows are [out, in]; its w2 rows are
[in, out] (the model computes `h @ w2`), so w2 is always transposed, also where hidden and ffn size agree.
Checkpoints "converted" to one linear an expert keep w2 as [out, in]; there the shape decides.

The configuration has its RoPE base inside `attn_config`, where transformers 5 does not look: it would run
with base 10000 instead of 500000, without a word. Only a `rope_theta` at the top level goes before it; a
`rope_parameters` there does not, since transformers 5 writes its default into it when it saves a DBRX.
"""

from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.families.facts import (
    Architecture,
    BlockSpec,
    ExpertsSpec,
    FloatSpec,
    LinearSpec,
    Source,
    load_linear,
    module_linears,
)
from dbrx_quant.runtime.families.family import Family
from dbrx_quant.runtime.families.parts import (
    DecoderParts,
    LayerParts,
    UnknownPartError,
    fused_linears,
    of_class,
    quant_experts,
    quant_linears,
)
from dbrx_quant.runtime.files.errors import CheckpointError

RENAMES = (
    ("transformer.", "model."),
    (".blocks.", ".layers."),
    (".ffn.experts.mlp.", ".block_sparse_moe.experts."),
    (".ffn.router.layer.", ".block_sparse_moe.gate."),
    (".norm_attn_norm.norm_1.", ".input_layernorm."),
    (".norm_attn_norm.norm_2.", ".post_attention_layernorm."),
    (".norm_attn_norm.attn.", ".self_attn."),
    (".out_proj.", ".o_proj."),
    (".norm_f.", ".norm."),
    (".wte.", ".embed_tokens."),
)
KEYS = ("w1", "v1", "w2")

# All that vLLM's own DBRX config accepts; the sizes of a layer without dropout need no more.
_ATTENTION_KEYS = ("attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta")
_FFN_KEYS = (
    "ffn_act_fn",
    "ffn_hidden_size",
    "moe_jitter_eps",
    "moe_loss_weight",
    "moe_normalize_expert_weights",
    "moe_num_experts",
    "moe_top_k",
)
_TRANSFORMERS_BASE = 10000.0


def _describe(config: Any) -> Architecture:
    hidden, heads = config.d_model, config.n_heads
    kv = config.attn_config.kv_n_heads * (hidden // heads)
    ffn, experts = config.ffn_config.ffn_hidden_size, config.ffn_config.moe_num_experts

    def attention(index: int) -> tuple[tuple[LinearSpec, ...], ...]:
        key, module = f"model.layers.{index}.self_attn", f"transformer.blocks.{index}.norm_attn_norm.attn"

        def part(role: str, begin: int, n: int) -> LinearSpec:
            fused = Source(f"{key}.Wqkv.weight", (begin, begin + n), of=hidden + 2 * kv)
            split = Source(f"{key}.{role}_proj.weight")
            outputs = (begin, begin + n)
            name = f"{key}.{role}_proj"
            return LinearSpec(name, role, f"{module}.Wqkv", outputs, (hidden, n), (fused, split), block=index)

        o_source = (Source(f"{key}.o_proj.weight"),)
        o = LinearSpec(
            f"{key}.o_proj", "o", f"{module}.out_proj", None, (hidden, hidden), o_source, block=index
        )
        return (part("q", 0, hidden), part("k", hidden, kv), part("v", hidden + kv, kv)), (o,)

    def expert_linears(index: int, expert: int) -> tuple[LinearSpec, LinearSpec, LinearSpec]:
        key = f"model.layers.{index}.block_sparse_moe.experts"
        module = f"transformer.blocks.{index}.ffn.experts"

        def part(role: str, name: str, shape: tuple[int, int]) -> LinearSpec:
            down = role == "down"
            sources = (
                Source(f"{key}.{name}", (expert * ffn, (expert + 1) * ffn), down, of=experts * ffn),
                Source(f"{key}.{expert}.{name}.weight", transposed=None if down and hidden != ffn else False),
            )
            full, owner = f"{key}.{expert}.{name}", f"{module}.{expert}.{name}"
            return LinearSpec(full, role, owner, None, shape, sources, block=index, expert=expert)

        return (
            part("gate", "w1", (hidden, ffn)),
            part("up", "v1", (hidden, ffn)),
            part("down", "w2", (ffn, hidden)),
        )

    def block(index: int) -> BlockSpec:
        key, module = f"model.layers.{index}", f"transformer.blocks.{index}"
        return BlockSpec(
            index,
            module,
            f"{module}.ffn",
            attention(index),
            ExpertsSpec(
                f"{module}.ffn.experts",
                f"{module}.ffn.router",
                config.ffn_config.moe_top_k,
                config.ffn_config.ffn_act_fn.get("name", "silu"),
                KEYS,
                tuple(expert_linears(index, expert) for expert in range(experts)),
            ),
            (
                FloatSpec(
                    f"{key}.input_layernorm.weight", f"{module}.norm_attn_norm.norm_1.weight", (hidden,)
                ),
                FloatSpec(
                    f"{key}.post_attention_layernorm.weight",
                    f"{module}.norm_attn_norm.norm_2.weight",
                    (hidden,),
                ),
                FloatSpec(
                    f"{key}.block_sparse_moe.gate.weight",
                    f"{module}.ffn.router.layer.weight",
                    (experts, hidden),
                ),
            ),
        )

    vocabulary = config.vocab_size
    tied = bool(config.tie_word_embeddings)
    head = (Source("model.embed_tokens.weight" if tied else "lm_head.weight"),)
    return Architecture(
        "dbrx",
        hidden,
        vocabulary,
        tuple(block(index) for index in range(config.n_layers)),
        (
            FloatSpec("model.embed_tokens.weight", "transformer.wte.weight", (vocabulary, hidden)),
            FloatSpec("model.norm.weight", "transformer.norm_f.weight", (hidden,)),
        ),
        LinearSpec("lm_head", "head", "lm_head", None, (hidden, vocabulary), head),
        tied,
        RENAMES,
    )


def _dense_state(architecture: Architecture, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The fused tensors that transformers reads, of a checkpoint with one linear an expert."""
    if any(checkpoint.info(name).name.endswith(".ffn.experts.mlp.w1") for name in checkpoint.names()):
        return None
    state = {kept.parameter: checkpoint.load(kept.name) for kept in architecture.all_floats()}
    single = [spec for spec in architecture.linears() if spec.expert is None]
    for module, specs in module_linears(single).items():
        state[f"{module}.weight"] = torch.cat([load_linear(checkpoint, spec) for spec in specs])
    for block in architecture.blocks:
        assert block.experts is not None  # every block of DBRX has experts
        for key, role in zip(block.experts.keys, zip(*block.experts.linears, strict=True), strict=True):
            parts = [load_linear(checkpoint, spec) for spec in role]
            if role[0].role == "down":
                parts = [part.T for part in parts]
            state[f"{block.experts.module}.mlp.{key}"] = torch.cat(parts)
    return state


def _fix_config(config: Any, raw: dict[str, Any], chosen: bool) -> None:
    if "rope_theta" in raw or (chosen and config.rope_parameters.get("rope_theta") != _TRANSFORMERS_BASE):
        return
    theta = (raw.get("attn_config") or {}).get("rope_theta")
    if theta:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}


def _patch_config(config: dict[str, Any]) -> dict[str, Any]:
    """Copy the base to the top level, and keep the nested keys that describe the model.

    vLLM rejects nested configs with keys it does not know, and transformers 5 saves plenty of those
    (`_name_or_path`, `output_attentions`, …).
    """
    attention = dict(config.get("attn_config") or {})
    ffn = dict(config.get("ffn_config") or {})
    # The order in which `_fix_config` looks: what the model was calibrated with is what the output says.
    parameters = config.get("rope_parameters") or {}
    if config.get("rope_theta"):
        base = parameters.get("rope_theta") or config["rope_theta"]
    else:
        base = attention.get("rope_theta") or parameters.get("rope_theta")
    if base is None:
        raise CheckpointError(
            "config.json: no rope_theta, neither at the top level nor in attn_config; DBRX's is 500000"
        )
    attention["rope_theta"] = base
    patched = {**config, "rope_theta": base}
    if parameters:
        patched["rope_parameters"] = {**parameters, "rope_theta": base}
    patched["attn_config"] = {key: attention[key] for key in _ATTENTION_KEYS if key in attention}
    patched["ffn_config"] = {key: ffn[key] for key in _FFN_KEYS if key in ffn}
    return patched


def _config_problems(config: dict[str, Any]) -> list[str]:
    """What makes readers run at different RoPE bases."""

    def nested(key: str) -> Any:
        section = config.get(key)
        return section.get("rope_theta") if isinstance(section, dict) else None

    bases = {
        "rope_theta": config.get("rope_theta"),
        "rope_parameters": nested("rope_parameters"),
        "attn_config": nested("attn_config"),
    }
    problems = []
    if not bases["rope_theta"] and not bases["rope_parameters"]:
        problems.append(
            f"config.json: rope_theta is not at the top level (attn_config has {bases['attn_config']}); "
            "transformers 5 by itself would use 10000"
        )
    given = {key: base for key, base in bases.items() if isinstance(base, (int, float)) and base}
    if len(set(given.values())) > 1:  # a DBRX config that transformers 5 read and saved again is like that
        text = ", ".join(f"{base} in {key}" for key, base in given.items())
        problems.append(
            f"config.json: has different RoPE bases: {text}; keep the one the model was trained with"
        )
    return problems


def _vllm_problem(config: Any) -> str:
    """What vLLM computes otherwise: it reads one RoPE base of several, and knows one normalization."""
    norm = config.ffn_config.moe_normalize_expert_weights
    if norm != 1:
        return f"moe_normalize_expert_weights is {norm}; vLLM computes as with 1"
    base, nested = config.rope_parameters.get("rope_theta"), config.attn_config.rope_theta
    if base != int(nested):
        return f"the RoPE base is {base}; vLLM reads {nested} in attn_config"
    if config.tie_word_embeddings:
        return "the embedding is the head, too (tie_word_embeddings), which vLLM does not know of this family"
    return ""


def _layer_parts(model: Any) -> DecoderParts:

    of_class(model, "DbrxModel")
    last = _layer_norm(model.norm_f)
    return DecoderParts(
        [_parts_of_block(block) for block in model.blocks[: model.config.num_hidden_layers]],
        last.weight,
        last.eps,
    )


def _layer_norm(module: Any) -> Any:

    if of_class(module, "LayerNorm").bias is not None:
        raise UnknownPartError
    return module


def _parts_of_block(block: Any) -> LayerParts:

    of_class(block, "DbrxBlock")
    outer, ffn = of_class(block.norm_attn_norm, "DbrxNormAttentionNorm"), of_class(block.ffn, "DbrxFFN")
    attention = of_class(outer.attn, "DbrxAttention")
    norms = [_layer_norm(norm) for norm in (outer.norm_1, outer.norm_2)]
    if norms[0].eps != norms[1].eps:
        raise UnknownPartError
    experts = quant_experts(ffn.experts)
    router = of_class(of_class(ffn.router, "DbrxRouter").layer, "Linear")
    if ffn.moe_normalize_expert_weights == 0:  # a norm for torch; "none" for the native step
        raise UnknownPartError
    return LayerParts(
        norms=(norms[0].weight, norms[1].weight),
        head_norms=None,
        qkv=fused_linears(attention.Wqkv),
        output=quant_linears(attention.out_proj)[0],
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


FAMILY = Family(
    "dbrx",
    ("DbrxForCausalLM",),
    _describe,
    renames=RENAMES,
    layer_parts=_layer_parts,
    output="MoeModelOutputWithPast",
    fix_config=_fix_config,
    patch_config=_patch_config,
    config_problems=_config_problems,
    dense_state=_dense_state,
    vllm_by_module=True,
    vllm_problem=_vllm_problem,
    exllamav2_note="It leaves out DBRX's limit on queries, keys and values (`clip_qkv`), so its results may "
    "differ.",
    notice_license="databricks",
    tiktoken_module="tokenization_dbrx",
)
