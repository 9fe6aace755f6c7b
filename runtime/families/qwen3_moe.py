"""Qwen3-MoE: head norms, experts under `mlp`, and blocks that stay dense where the configuration says so."""

from typing import Any

from dbrx_quant.runtime.families import llama_like
from dbrx_quant.runtime.families.facts import Architecture, BlockSpec
from dbrx_quant.runtime.families.family import Family


def _describe(config: Any) -> Architecture:
    bias = bool(getattr(config, "attention_bias", False))

    def block(index: int) -> BlockSpec:
        attention = llama_like.attention(config, index, qkv_bias=bias, o_bias=bias)
        if not llama_like.is_sparse(config, index):
            dense = llama_like.dense_mlp(config, index, config.intermediate_size)
            return llama_like.block(config, index, attention + dense, head_norms=True)
        moe = llama_like.qwen_experts(config, index)
        return llama_like.block(config, index, attention, moe, "mlp.gate", head_norms=True)

    return llama_like.model(config, "qwen3_moe", tuple(block(i) for i in range(config.num_hidden_layers)))


FAMILY = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    _describe,
    switches=(llama_like.ATTENTION_BIAS,),
    layer_parts=llama_like.layer_parts,
    output="MoeModelOutputWithPast",
)
