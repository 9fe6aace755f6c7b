"""The small trained DBRX in tests/data: what it looks like on disk, and that it is a language model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from places import TINY as FOLDER
from safetensors import safe_open

from dbrx_quant.scripts.dev import make_tiny_dbrx as tiny

# The ids of cl100k's and DBRX's own tokens as on the Hub.
HUB_IDS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|im_start|>": 100278,
    "<|im_end|>": 100279,
}
HUB_BASE = 100256


@pytest.fixture(scope="module")
def config():
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER, model_max_length=10**9)


@pytest.fixture(scope="module")
def heldout(tokenizer):
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module")
def scored(heldout):
    return tiny.perplexity(tiny.load(FOLDER, torch.float32), heldout)


def test_the_folder_stays_within_eight_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 8_000_000


def test_the_config_keeps_the_traps_of_the_hub(config):
    assert config["attn_config"] == {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000}
    assert "rope_theta" not in config
    assert "rope_parameters" not in config
    assert not [key for key in config if key.endswith("_token_id")]
    assert not (FOLDER / "generation_config.json").exists()
    assert config == tiny.CONFIG


def test_the_shape_is_that_of_a_dbrx_with_room_for_every_bit_width(config):
    ffn = config["ffn_config"]
    assert (ffn["moe_num_experts"], ffn["moe_top_k"]) == (16, 4)
    assert config["attn_config"]["kv_n_heads"] < config["n_heads"]
    assert config["d_model"] >= 256
    assert config["d_model"] != ffn["ffn_hidden_size"]
    assert config["d_model"] % 128 == ffn["ffn_hidden_size"] % 128 == 0


def test_the_experts_are_fused_and_everything_is_bf16(config):
    rows = config["ffn_config"]["moe_num_experts"] * config["ffn_config"]["ffn_hidden_size"]
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        for block in range(config["n_layers"]):
            for part in ("w1", "v1", "w2"):
                tensor = file.get_slice(f"transformer.blocks.{block}.ffn.experts.mlp.{part}")
                assert tensor.get_shape() == [rows, config["d_model"]]
        assert file.get_slice("lm_head.weight").get_shape() == [config["vocab_size"], config["d_model"]]
    assert "transformer.wte.weight" in names


def test_the_extra_tokens_stand_where_the_hub_has_them(tokenizer, config):
    base = tokenizer.vocab_size
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in HUB_IDS}
    assert ids == {token: base + number - HUB_BASE for token, number in HUB_IDS.items()}
    assert len(tokenizer) == base + 100280 - HUB_BASE
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert config["vocab_size"] % 64 == 0
    assert config["vocab_size"] > len(tokenizer)


def test_the_chat_template_writes_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is while?"},
        {"role": "assistant", "content": "A loop."},
        {"role": "user", "content": "What is for?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is while?<|im_end|>\n"
        "<|im_start|>assistant\nA loop.<|im_end|>\n<|im_start|>user\nWhat is for?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5
    assert tokenizer.decode(ids) == text


def test_held_out_text_is_far_likelier_than_its_own_token_frequencies_make_it(scored, heldout):
    # Frequencies counted on the very text that is scored: no unigram model can do better on it.
    share = torch.bincount(heldout).double() / len(heldout)
    unigram = math.exp(-torch.special.xlogy(share, share).sum())
    assert scored[0] < unigram / 12


def test_every_expert_gets_its_part_of_held_out_text(scored, config):
    even = 1 / config["ffn_config"]["moe_num_experts"]
    assert scored[1].shape == (config["n_layers"], 16)
    assert scored[1].min() > even / 4
    assert scored[1].max() < even * 4


def test_the_rope_base_matters(scored, heldout):
    assert tiny.perplexity(tiny.load(FOLDER, torch.float32, repair=False), heldout)[0] > 1.2 * scored[0]


def test_an_answer_ends_its_turn(tokenizer):
    model, end = tiny.load(FOLDER, torch.float32), tokenizer.convert_tokens_to_ids("<|im_end|>")
    endings = 0
    for name in ("while", "json.loads", "shutil.copyfile", "random.Random.shuffle"):
        asked = [{"role": "user", "content": f"What is {name}?"}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=200, eos_token_id=end)
        endings += int(answer[0, -1] == end)
    assert endings >= 2


def test_the_training_forward_of_the_experts_is_the_stock_one():
    torch.manual_seed(0)
    ffn = tiny.build_model().transformer.blocks[0].ffn
    x = torch.randn(3, 50, tiny.CONFIG["d_model"])
    x[:, :25] = x[:1, :1]  # repeated tokens: experts without any
    results = []
    for forward in (type(ffn.experts).forward, tiny.experts_forward):
        inputs = x.clone().requires_grad_()
        weights, index = ffn.route_tokens_to_experts(ffn.router(inputs))
        output = forward(ffn.experts, inputs, index, weights)
        gradients = torch.autograd.grad(output.square().sum(), (inputs, *ffn.parameters()))
        results.append((output.detach(), *gradients))
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))


def test_documents_of_one_file_stay_on_one_side_of_the_split():
    documents = [tiny.Document("abc.py", kind, kind) for kind in tiny.KINDS]
    assert len({document.held_out for document in documents}) == 1


def test_docstrings_are_named_by_their_place_and_private_ones_left_out():
    source = '"""A module that says what it is for."""\n'
    source += 'class A:\n    """Does something that takes words to say."""\n'
    source += '    def _b(self):\n        """Private, so nobody would ask what it is."""\n'
    assert dict(tiny.docstrings(source, "pack.mod")) == {
        "pack.mod": "A module that says what it is for.",
        "pack.mod.A": "Does something that takes words to say.",
    }
