"""An original is read as its weights show it to be; what they contradict and do not decide is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save_model

from dbrx_quant.runtime.families.facts import load_bias, load_linear
from dbrx_quant.runtime.families.source import embedding_rows, open_source
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.model.load_dense import load_dense

FAMILIES = ("dbrx", "llama", "mixtral", "qwen2 moe", "qwen3 moe")
EMBEDDING = {"dbrx": "transformer.wte.weight"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in (*FAMILIES, "llama tied and biased"):
        save_model(folder / family, family)
    return folder


@pytest.fixture
def model(models, tmp_path):
    """A function that gives a copy of a model with other values in its config and other tensors."""

    def make(family, change=None, **config):
        folder = tmp_path / "model"
        shutil.copytree(models / family, folder)
        file = folder / "config.json"
        found = json.loads(file.read_text())
        for key, value in config.items():
            section, _, inner = key.rpartition("__")
            (found[section] if section else found)[inner] = value
        file.write_text(json.dumps(found))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def without(name):
    """A change that takes a tensor away."""
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_other_than_the_embedding_is_the_head_whatever_the_config_says(model, family):
    folder = model(family, tie_word_embeddings=True)
    source = open_source(folder)
    assert source.corrections == {"tie_word_embeddings": False}
    assert source.config.tie_word_embeddings is False
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_linear(source.checkpoint, source.architecture.head), head)
    (note,) = source.notes
    assert note == "config.json: tie_word_embeddings is true, by the weights it is false; they are followed"
    assert torch.equal(load_dense(folder).lm_head.weight, head)


def test_a_stored_copy_of_the_embedding_is_a_tied_head(model):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = open_source(model("llama", copy, tie_word_embeddings=True))
    assert (source.corrections, source.architecture.tied) == ({}, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_head_that_does_not_claim_to_be_tied_is_refused(model, family):
    folder = model(family, without("lm_head.weight"))
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings is not true in config\.json and no lm_head"
    ):
        open_source(folder)


@pytest.mark.parametrize("said", [False, None])
def test_stored_biases_are_used_whatever_the_config_says(model, said):
    source = open_source(model("llama tied and biased", attention_bias=said))
    assert source.corrections == {"attention_bias": True}
    assert all(
        load_bias(source.checkpoint, spec) is not None for spec in source.architecture.blocks[0].stages[0]
    )


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "attention_bias"),
        ("llama", "mlp_bias"),
        ("qwen3 moe", "attention_bias"),
    ],
)
def test_biases_that_are_not_stored_are_not_missed(model, family, key):
    assert open_source(model(family, **{key: True})).corrections == {key: False}


def test_the_biases_of_qwen2_moe_are_a_switch_both_ways(model):
    assert open_source(model("qwen2 moe", qkv_bias=False)).corrections == {"qkv_bias": True}


def test_the_switch_of_biases_that_is_on_by_default_can_be_off(model):
    def plain(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.bias")}

    assert open_source(model("qwen2 moe", plain)).corrections == {"qkv_bias": False}


def test_half_of_the_biases_are_refused_naming_one_that_is_there_and_one_that_is_not(model):
    folder = model("llama tied and biased", without("model.layers.1.self_attn.o_proj.bias"))
    with pytest.raises(
        CheckpointError,
        match=r"attention_bias is true .*layers\.0\S+bias is stored, \S+1\.self_attn\.o_proj\.bias is",
    ):
        open_source(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", [128, 500])
def test_the_embedding_tells_the_size_of_the_vocabulary(model, family, said):
    folder = model(family, vocab_size=said)
    source = open_source(folder)
    assert source.corrections == {"vocab_size": 300}
    assert source.architecture.vocabulary == source.config.vocab_size == embedding_rows(folder) == 300


def test_a_head_with_other_rows_than_the_embedding_is_refused(model):
    def shorter(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-4].contiguous()

    with pytest.raises(CheckpointError, match=r"lm_head\.weight: shape \(296, 64\) does not hold lm_head"):
        open_source(model("llama", shorter))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"num_hidden_layers": 1}, "describes 1 layers, the weights have 2"),
        ("llama", {"num_hidden_layers": 3}, "describes 3 layers, the weights have 2"),
        ("llama", {"hidden_size": 128}, "describes 128 channels, the weights have 64"),
        ("llama", {"intermediate_size": 64}, r"gate_proj\.weight: shape \(96, 64\) .* as \(64, 64\)"),
        ("llama", {"num_key_value_heads": 1}, r"k_proj\.weight: shape \(32, 64\) .* as \(16, 64\)"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral', but LlamaForCausalLM is of 'llama'"),
        ("mixtral", {"num_local_experts": 2}, "describes 2 experts in layer 0, the weights have 4"),
        ("qwen3 moe", {"num_local_experts": 8}, "describes 8 experts in layer 0, the weights have 4"),
        (
            "qwen3 moe",
            {"mlp_only_layers": []},
            r"describes \[0, 1\] layers with experts, the weights have \[0\]",
        ),
        ("qwen3 moe", {"head_dim": 32}, r"q_proj\.weight: shape \(64, 64\) .* as \(128, 64\)"),
        (
            "qwen2 moe",
            {"shared_expert_intermediate_size": 64},
            r"shared_expert\.\S+ shape \(96, 64\) .* as \(64, 64\)",
        ),
        ("dbrx", {"n_layers": 1}, "describes 1 layers, the weights have 2"),
        ("dbrx", {"ffn_config__moe_num_experts": 2}, "describes 2 experts in layer 0, the weights have 4"),
        ("dbrx", {"ffn_config__ffn_hidden_size": 48}, r"shape \(384, 64\) .* in its rows 0 to 48 of 192"),
        (
            "dbrx",
            {"attn_config__kv_n_heads": 1},
            r"Wqkv\.weight: shape \(128, 64\) .* in its rows 0 to 64 of 96",
        ),
    ],
)
def test_a_size_that_the_weights_contradict_is_refused_with_both_values(model, family, config, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(model(family, **config))


def test_whole_numbers_are_no_weights_of_an_original(model):
    def whole(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)

    with pytest.raises(CheckpointError, match=r"up_proj\.weight: type I8, expected one of"):
        open_source(model("llama", whole))


def same(found, expected):
    names = found.checkpoint.names()
    return names == expected.checkpoint.names() and all(
        torch.equal(found.checkpoint.load(name), expected.checkpoint.load(name)) for name in names
    )


@pytest.mark.parametrize("family", ["llama", "dbrx"])
@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.removeprefix("model.").removeprefix("transformer."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
    ],
    ids=["without its head's class", "in parallel", "compiled"],
)
def test_models_saved_in_other_classes_are_read(models, model, family, renamed):
    folder = model(family, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    assert same(open_source(folder), open_source(models / family))
    reference, found = load_dense(models / family), load_dense(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), reference.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_read(models, model, shards):
    folder = model("mixtral")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        for i in range(2):
            part = {name: tensors[name] for name in names[i::2]}
            torch.save(part, folder / f"pytorch_model-{i + 1:05d}-of-00002.bin")
    torch.save({"step": 1}, folder / "training_args.bin")
    assert same(open_source(folder), open_source(models / "mixtral"))
    assert torch.equal(load_dense(folder).lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [({"model": {"a": torch.zeros(1)}}, "holds more than named tensors"), (b"no pickle", "not readable")],
)
def test_a_bin_file_of_something_else_is_refused_with_what_to_run(model, content, message):
    folder = model("llama")
    (folder / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: {message}.*save_pretrained"):
        open_source(folder)
