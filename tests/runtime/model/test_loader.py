"""`load_model` gives the model that the stored weights mean, from any legal folder, and refuses others."""

import json
from pathlib import Path

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from safetensors.torch import load_file, save_file
from small_configs import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.model.load_dense import load_dense

EXPERT = "model.layers.1.block_sparse_moe.experts.2.v1"
IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(model.device)).logits


def dbrx(tmp_path, **options):
    return build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "dbrx", **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dense_model_with_the_dequantized_weights(name, tmp_path):
    folder = build_quantized_folder(CONFIGS[name](), tmp_path / "model")
    exact = logits(folder.twin(torch.float64))
    plain = (logits(folder.twin()) - exact).abs().max()
    ours = (logits(load_model(folder.path)) - exact).abs().max()
    assert ours <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_plain_torch_in_half_precision(dtype, tmp_path):
    # one block of a dense model: routing would turn a rounding into another expert
    config = LlamaConfig(**(SMALL | {"num_hidden_layers": 1}))
    folder = build_quantized_folder(config, tmp_path / "model")
    exact = logits(folder.twin(torch.float64))
    plain = (logits(folder.twin(dtype)) - exact).double().norm()
    model = load_model(folder.path, dtype=dtype)
    assert logits(model).dtype == dtype
    assert (logits(model) - exact).double().norm() <= 2 * plain


@pytest.mark.parametrize("name", ["llama tied and biased", "mixtral"])
def test_a_head_left_in_16_bits_or_tied_is_used_as_it_is(name, tmp_path):
    folder = build_quantized_folder(CONFIGS[name](), tmp_path / "model", head=False)
    model = load_model(folder.path)
    assert type(model.lm_head) is torch.nn.Linear
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == folder.twin().config.tie_word_embeddings
    torch.testing.assert_close(logits(model), logits(folder.twin()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["split", "fused"])
def test_attention_of_a_block_may_stay_dense(stored, tmp_path):
    folder = dbrx(tmp_path)
    prefix = "model.layers.1.self_attn"
    shapes = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}
    dense = {key: folder.weight(f"{prefix}.{key}", n) for key, n in shapes.items()}
    for name in [name for name in folder.tensors if name.startswith(prefix)]:
        del folder.tensors[name]
    folder.tensors |= {f"{prefix}.{key}.weight": weight.contiguous() for key, weight in dense.items()}
    twin = folder.twin()
    if stored == "fused":
        parts = [folder.tensors.pop(f"{prefix}.{key}.weight") for key in ("q_proj", "k_proj", "v_proj")]
        folder.tensors[f"{prefix}.Wqkv.weight"] = torch.cat(parts)
    folder.write()
    torch.testing.assert_close(logits(load_model(folder.path)), logits(twin), rtol=1e-4, atol=1e-4)


def test_dbrx_names_as_on_the_hub_load_too(tmp_path):
    folder = dbrx(tmp_path)
    expected = logits(load_model(folder.path))
    for new, old in (
        ("model.layers.", "transformer.blocks."),
        (".self_attn.", ".norm_attn_norm.attn."),
        (".block_sparse_moe.experts.", ".ffn.experts.mlp."),
        ("model.embed_tokens.", "transformer.wte."),
    ):
        folder.tensors = {name.replace(new, old): tensor for name, tensor in folder.tensors.items()}
    folder.write()
    assert torch.equal(logits(load_model(folder.path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.path, dtype="float32")), expected)


def test_a_stale_index_and_tensors_of_old_writers_are_ignored(tmp_path):
    folder = dbrx(tmp_path, shard="output-00001-of-00001.safetensors")
    folder.tensors[f"{EXPERT}.q_perm"] = torch.zeros(64, dtype=torch.int16)
    folder.write("output-00001-of-00001.safetensors")
    expected = logits(load_model(folder.path))
    stale = {"weight_map": {"lm_head.weight": "model-00001-of-00061.safetensors"}}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert torch.equal(logits(load_model(folder.path)), expected)


def test_a_config_without_a_quantization_block_loads(tmp_path):
    folder = dbrx(tmp_path)
    expected = logits(load_model(folder.path))
    edit_config(folder, lambda config: config.pop("quantization_config"))
    model = load_model(folder.path)
    assert torch.equal(logits(model), expected)
    assert model.config.quantization_config.quant_method == "exl2"


def test_the_rope_base_of_dbrx_counts_where_only_the_attention_config_has_it(tmp_path):
    folder = dbrx(tmp_path)
    expected = logits(load_model(folder.path))

    def nest(config):
        config["attn_config"]["rope_theta"] = config.pop("rope_theta")

    edit_config(folder, nest)
    assert torch.equal(logits(load_model(folder.path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.path, dtype="float32")), expected)
    edit_config(folder, lambda config: config["attn_config"].update(rope_theta=10000.0))
    assert not torch.equal(logits(load_model(folder.path)), expected)


def test_packed_weights_on_the_cpu_are_views_of_the_mapped_file(tmp_path):
    folder = dbrx(tmp_path)
    model = load_model(folder.path)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.path) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    packed = [t for name, t in model.state_dict().items() if t.dtype != torch.float32]
    assert len(packed) > 100
    for tensor in packed:
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)


def test_a_model_stays_usable_after_the_folder_is_gone_and_leaves_the_file_alone(tmp_path):
    folder = dbrx(tmp_path)
    before = (folder.path / "model.safetensors").read_bytes()
    model = load_model(folder.path)
    expected = logits(model)
    model.get_parameter("transformer.norm_f.weight").data.zero_()
    model.get_buffer("lm_head.q_scale_max").zero_()
    assert (folder.path / "model.safetensors").read_bytes() == before
    other = load_model(folder.path)
    (folder.path / "model.safetensors").unlink()
    assert torch.equal(logits(other), expected)


def edit_config(folder, change):
    path = folder.path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def drop(suffix):
    return lambda folder: folder.tensors.pop(f"{EXPERT}.{suffix}")


def leave_unquantized(folder):
    for name in [name for name in folder.tensors if name.startswith(EXPERT)]:
        del folder.tensors[name]
    folder.tensors[f"{EXPERT}.weight"] = torch.zeros(96, 64).half()


def fused_unquantized(folder):
    for name in [name for name in folder.tensors if name.endswith(".v1") or ".v1." in name]:
        del folder.tensors[name]
    folder.tensors["model.layers.0.block_sparse_moe.experts.v1"] = torch.zeros(4 * 96, 64).half()


def dense_query(folder):
    name = "model.layers.0.self_attn.q_proj"
    dense = folder.weight(name, 64).contiguous()
    for key in [key for key in folder.tensors if key.startswith(name)]:
        del folder.tensors[key]
    folder.tensors[f"{name}.weight"] = dense


def rename_up(folder):
    folder.tensors = {name.replace(".v1.", ".w3."): tensor for name, tensor in folder.tensors.items()}


def all_dense(folder):
    folder.tensors = {"model.norm.weight": torch.ones(64).half()}


BROKEN = {
    "an expert's tensor is missing": (drop("q_scale"), rf"{EXPERT}.q_scale: missing"),
    "an expert is unquantized": (leave_unquantized, rf"{EXPERT}.weight: leaves {EXPERT} unquantized"),
    "fused experts are unquantized": (fused_unquantized, r"experts.v1: leaves .*experts.0.v1 unquantized"),
    "a query is unquantized": (dense_query, r"q_proj.weight: leaves .*q_proj unquantized"),
    "names of another family": (rename_up, r"experts.0.v1.q_weight: missing.*unexpected tensors.*\.w3\."),
    "nothing is quantized": (all_dense, r"none of its linears is stored as EXL2"),
    "a norm is missing": (lambda f: f.tensors.pop("model.norm.weight"), "model.norm.weight: missing"),
    "a norm has another length": (
        lambda f: f.tensors.update({"model.norm.weight": torch.ones(32).half()}),
        r"model.norm.weight: shape \(32,\), config.json requires \(64,\)",
    ),
    "a norm of integers": (
        lambda f: f.tensors.update({"model.norm.weight": torch.ones(64).int()}),
        "model.norm.weight: type I32",
    ),
    "a surplus tensor": (
        lambda f: f.tensors.update(surprise=torch.zeros(1)),
        "describes a dbrx model with fewer tensors; unexpected tensors: surprise",
    ),
    "a bias where there is none": (
        lambda f: f.tensors.update({"lm_head.bias": torch.zeros(128).half()}),
        "lm_head.bias: this linear of the model has no bias",
    ),
    "a broken permutation": (
        lambda f: f.tensors[f"{EXPERT}.q_invperm"].zero_(),
        rf"{EXPERT}.q_invperm: row 0 occurs 64 times",
    ),
    "an expert more than the config says": (
        lambda f: edit_config(f, lambda c: c["ffn_config"].update(moe_num_experts=3)),
        r"layers.0.block_sparse_moe.gate.weight: shape \(4, 64\), config.json requires \(3, 64\)",
    ),
    "an expert less than the config says": (
        lambda f: edit_config(f, lambda c: c["ffn_config"].update(moe_num_experts=5)),
        r"experts.4.w1.q_weight: missing",
    ),
    "another ffn size in the config": (
        lambda f: edit_config(f, lambda c: c["ffn_config"].update(ffn_hidden_size=64)),
        r"experts.0.w1: 64 input and 96 output channels, config.json requires 64 and 64",
    ),
    "another vocabulary in the config": (
        lambda f: edit_config(f, lambda c: c.update(vocab_size=100)),
        r"embed_tokens.weight: shape \(128, 64\), config.json requires \(100, 64\)",
    ),
}


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_and_never_filled_up(fault, load, tmp_path):
    change, message = BROKEN[fault]
    folder = dbrx(tmp_path)
    change(folder)
    folder.write()
    with pytest.raises(CheckpointError, match=message):
        load(folder.path)


def test_another_quantization_method_is_refused(tmp_path):
    folder = dbrx(tmp_path)
    edit_config(folder, lambda config: config["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(CheckpointError, match="quant_method is 'gptq', expected 'exl2'"):
        load_model(folder.path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")


def test_a_revision_of_a_folder_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="applies only to repositories"):
        load_model(tmp_path, revision="3.0bpw")


def test_a_repository_is_fetched_at_the_revision_asked_for(tmp_path, monkeypatch):
    folder = dbrx(tmp_path)
    asked = []

    def fetch(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(folder.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_model("someone/dbrx-exl2", revision="3.0bpw")
    assert asked == [("someone/dbrx-exl2", "3.0bpw")]


def test_generation_ends_at_the_ids_of_the_generation_config(tmp_path):
    folder = dbrx(tmp_path)
    (folder.path / "generation_config.json").write_text('{"eos_token_id": [3, 5], "pad_token_id": 7}')
    assert load_model(folder.path).generation_config.eos_token_id == [3, 5]


@pytest.mark.parametrize("name", CONFIGS)
def test_load_dense_gives_the_original_model(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_dense(tmp_path)), logits(model))


@pytest.mark.parametrize("naming", ["one linear an expert", "as in EXL2 files"])
def test_load_dense_fuses_what_transformers_wants_fused(naming, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["dbrx"]()).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts.mlp." in name]:
        prefix, key = name.rsplit(".", 1)
        for expert, rows in enumerate(tensors.pop(name).split(96)):
            weight = rows.T if key == "w2" else rows
            tensors[f"{prefix}.{expert}.{key}.weight"] = weight.contiguous()
    if naming == "as in EXL2 files":
        normalise = describe(load_config(tmp_path)).normalise
        tensors = {normalise(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_dense(tmp_path)), logits(model))


def test_load_dense_refuses_a_checkpoint_that_transformers_would_fill_up(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["dbrx"]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.blocks.0.ffn.experts.mlp.v1"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weight for model.layers.0.*experts.0.v1"):
        load_dense(tmp_path)


def test_load_dense_refuses_a_quantized_folder(tmp_path):
    with pytest.raises(CheckpointError, match="use load_model for it"):
        load_dense(dbrx(tmp_path).path)


def test_a_folder_written_by_exllamav2_loads_and_ends_a_chat_turn(shared):
    folder = shared / "golden" / "tiny-dbrx-exl2-3.0bpw"
    model = load_model(folder)
    assert model.config.rope_parameters["rope_theta"] == 500000
    generated = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends
