"""Qwen2-MoE: experts under `mlp`, beside one that every token passes, times the sigmoid of a gate."""

from dataclasses import replace
from typing import Any

from dbrx_quant.runtime.families import llama_like
from dbrx_quant.runtime.families.facts import Architecture, BlockSpec, FloatSpec
from dbrx_quant.runtime.families.family import Family, Switch


def _describe(config: Any) -> Architecture:
    def block(index: int) -> BlockSpec:
        attention = llama_like.attention(config, index, qkv_bias=config.qkv_bias)
        if not llama_like.is_sparse(config, index):
            dense = llama_like.dense_mlp(config, index, config.intermediate_size)
            return llama_like.block(config, index, attention + dense)
        shared = llama_like.dense_mlp(
            config,
            index,
            config.shared_expert_intermediate_size,
            place="mlp.shared_expert",
            prefix="shared_",
        )
        moe = llama_like.qwen_experts(config, index)
        found = llama_like.block(config, index, attention + shared, moe, "mlp.gate")
        gate = f"{found.mlp}.shared_expert_gate.weight"
        return replace(found, floats=(*found.floats, FloatSpec(gate, gate, (1, config.hidden_size))))

    return llama_like.model(config, "qwen2_moe", tuple(block(i) for i in range(config.num_hidden_layers)))


FAMILY = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    _describe,
    switches=(Switch("qkv_bias", llama_like.QKV, default=True),),
    exllamav2_note="It does not know this architecture.",
)
