"""A very small DBRX source and randomly quantized linears, to write and damage output folders with."""

import json

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from dbrx_quant.quantize.output.config import write_configs
from dbrx_quant.runtime.exl2.format import UnpackedLinear, pack_linear, padded_columns, uniform_groups
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.shards.write import write_shards
from dbrx_quant.runtime.tokenizer.fix import write_tokenizer

HIDDEN, FFN, EXPERTS, BLOCKS, VOCABULARY = 64, 96, 2, 2, 300

CONFIG = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {
        "ffn_hidden_size": FFN,
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": EXPERTS,
        "moe_top_k": 1,
    },
    "d_model": HIDDEN,
    "n_heads": 2,
    "n_layers": BLOCKS,
    "max_seq_len": 128,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

ADDED = {"<|endoftext|>": 257, "<|pad|>": 258, "<|im_start|>": 259, "<|im_end|>": 260}  # 256 is a hole
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_CONFIG = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "tokenizer_class": "GPT2Tokenizer",
    "chat_template": CHATML,
}


def added_token(number, content, special=True):
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def tokenizer_json(added=ADDED, vocab=None):
    """A byte-level tokenizer without merges, ids 0 to 255, that splits digits one by one."""
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = vocab or {piece: number for number, piece in enumerate(sorted(ByteLevel.alphabet()))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, content) for content, number in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def make_tokenizer(folder, tokenizer=None, config=TOKENIZER_CONFIG):
    folder.mkdir(exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer or tokenizer_json())
    write_json(folder / "tokenizer_config.json", config)


def source_tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (0.02 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    tensors = {
        "transformer.wte.weight": normal(VOCABULARY, HIDDEN),
        "transformer.norm_f.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        key = f"transformer.blocks.{block}"
        for norm in ("norm_1", "norm_2"):
            tensors[f"{key}.norm_attn_norm.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        tensors[f"{key}.norm_attn_norm.attn.Wqkv.weight"] = normal(HIDDEN + 2 * HIDDEN // 2, HIDDEN)
        tensors[f"{key}.norm_attn_norm.attn.out_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{key}.ffn.router.layer.weight"] = normal(EXPERTS, HIDDEN)
        for part in ("w1", "v1", "w2"):
            tensors[f"{key}.ffn.experts.mlp.{part}"] = normal(EXPERTS * FFN, HIDDEN)
    return tensors


def make_source(folder, tensors=None, config=CONFIG):
    make_tokenizer(folder)
    write_json(folder / "config.json", config)
    save_file(source_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def random_linear(spec, seed=0):
    """Tensors of a linear with random codes: its first 32 rows at 4 bits, the others at 3."""
    generator = torch.Generator().manual_seed(seed)
    k, n = spec.shape[0], padded_columns(spec.shape[1])
    groups = (*uniform_groups(32, 4, 32), *uniform_groups(k - 32, 3, 32))
    bits = torch.tensor([group.bits for group in groups for _ in range(group.rows)])
    codes = torch.randint(0, 256, (k, n), generator=generator) % (1 << bits)[:, None]
    unpacked = UnpackedLinear(
        codes=codes.to(torch.uint8),
        scale_codes=torch.randint(0, 16, (len(groups), n), generator=generator).to(torch.uint8),
        scale_max=torch.rand(len(groups), generator=generator).to(torch.float16) * 0.02,
        groups=groups,
        permutation=torch.randperm(k, generator=generator),
        bias=torch.zeros(n, dtype=torch.float16) if spec.bias else None,
    )
    return pack_linear(unpacked)


def quantize_randomly(architecture, folder):
    folder.mkdir(exist_ok=True)
    for seed, spec in enumerate(architecture.linears()):
        tensors = {f"{spec.name}.{suffix}": t for suffix, t in random_linear(spec, seed).items()}
        save_tensors(folder / f"{spec.name}.safetensors", tensors)
    return folder


def make_output(folder, max_shard_bytes=8e9, source=None):
    """A finished output in `folder / "out"`; its source (made unless given) and linears lie beside it."""
    source = source or make_source(folder / "source")
    architecture = describe(load_config(source))
    linears = quantize_randomly(architecture, folder / "linears")
    out = folder / "out"
    write_shards(out, architecture, architecture.open(source), linears, max_shard_bytes)
    write_tokenizer(source, out, VOCABULARY)
    write_configs(
        source, out, architecture, bits=3.0, head_bits=6, rows=4, length=32, dataset="random tokens"
    )
    return out


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def delete(path):
    path.unlink()
