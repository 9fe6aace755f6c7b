"""Configurations of small models, one of each family."""

from transformers import (
    DbrxConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "dbrx": lambda: DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=128,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000.0},
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},  # transformers looks here alone
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    ),
    "llama": lambda: LlamaConfig(**SMALL),
    "llama tied and biased": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2 moe": lambda: Qwen2MoeConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=96,
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "qwen3 moe": lambda: Qwen3MoeConfig(
        **SMALL,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
    ),
}
