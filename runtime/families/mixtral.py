"""Mixtral: a Llama whose MLP is a set of experts w1, w3, w2 under `block_sparse_moe`."""

from typing import Any

from dbrx_quant.runtime.families import llama_like
from dbrx_quant.runtime.families.facts import Architecture, BlockSpec
from dbrx_quant.runtime.families.family import Family

KEYS = ("w1", "w3", "w2")


def _describe(config: Any) -> Architecture:
    def block(index: int) -> BlockSpec:
        moe = llama_like.experts(
            config,
            index,
            prefix="block_sparse_moe",
            keys=KEYS,
            count=config.num_local_experts,
            ffn=config.intermediate_size,
        )
        return llama_like.block(
            config, index, llama_like.attention(config, index), moe, "block_sparse_moe.gate"
        )

    return llama_like.model(config, "mixtral", tuple(block(i) for i in range(config.num_hidden_layers)))


FAMILY = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    _describe,
    layer_parts=llama_like.layer_parts,
    output="MoeModelOutputWithPast",
)
