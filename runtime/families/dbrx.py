"""DBRX: fused query-key-value, and 16 experts fused into three tensors a block.

In the fused tensors expert e owns the rows [e F, (e+1) F). Its w1 and v1 rows are [out, in]; its w2 rows are
[in, out] (the model computes `h @ w2`), so w2 is always transposed, also where hidden and ffn size agree.
Checkpoints "converted" to one linear an expert keep w2 as [out, in]; there the shape decides.
"""

from typing import Any

from dbrx_quant.runtime.families.facts import (
    Architecture,
    BlockSpec,
    ExpertsSpec,
    Family,
    FloatSpec,
    LinearSpec,
    Source,
)

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


def _describe(config: Any) -> Architecture:
    hidden, heads = config.d_model, config.n_heads
    kv = config.attn_config.kv_n_heads * (hidden // heads)
    ffn, experts = config.ffn_config.ffn_hidden_size, config.ffn_config.moe_num_experts

    def attention(index: int) -> tuple[tuple[LinearSpec, ...], ...]:
        key, module = f"model.layers.{index}.self_attn", f"transformer.blocks.{index}.norm_attn_norm.attn"

        def part(role: str, begin: int, n: int) -> LinearSpec:
            fused = Source(f"{key}.Wqkv.weight", (begin, begin + n))
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
                Source(f"{key}.{name}", (expert * ffn, (expert + 1) * ffn), transposed=down),
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


FAMILY = Family("dbrx", ("DbrxForCausalLM",), _describe)
