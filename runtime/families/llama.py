"""Dense models built like Llama: Llama, Mistral, Qwen2 (biased query, key, value), Qwen3 (head norms)."""

from typing import Any

from dbrx_quant.runtime.families import llama_like
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.families.family import Family, Switch


def _describe(config: Any, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool, head_norms: bool) -> Architecture:
    def block(index: int) -> Any:
        attention = llama_like.attention(config, index, qkv_bias=qkv_bias, o_bias=o_bias)
        mlp = llama_like.dense_mlp(config, index, config.intermediate_size, mlp_bias)
        return llama_like.block(config, index, attention + mlp, head_norms=head_norms)

    return llama_like.model(
        config, config.model_type, tuple(block(i) for i in range(config.num_hidden_layers))
    )


def _llama(config: Any) -> Architecture:
    bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return _describe(config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, head_norms=False)


def _mistral(config: Any) -> Architecture:
    return _describe(config, qkv_bias=False, o_bias=False, mlp_bias=False, head_norms=False)


def _qwen2(config: Any) -> Architecture:
    return _describe(config, qkv_bias=True, o_bias=False, mlp_bias=False, head_norms=False)


def _qwen3(config: Any) -> Architecture:
    bias = bool(getattr(config, "attention_bias", False))
    return _describe(config, qkv_bias=bias, o_bias=bias, mlp_bias=False, head_norms=True)


FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        _llama,
        switches=(
            llama_like.ATTENTION_BIAS,
            Switch("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ),
        layer_parts=llama_like.layer_parts,
    ),
    Family("mistral", ("MistralForCausalLM",), _mistral, layer_parts=llama_like.layer_parts),
    Family("qwen2", ("Qwen2ForCausalLM",), _qwen2, layer_parts=llama_like.layer_parts),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        _qwen3,
        switches=(llama_like.ATTENTION_BIAS,),
        layer_parts=llama_like.layer_parts,
    ),
)
