"""The written configs say what readers need, in the places where they look."""

import json

import pytest
import torch
from tiny_output import CONFIG, make_output, make_source, write_json
from transformers import AutoConfig, GenerationConfig

from dbrx_quant.quantize.output.config import Summary, generation_config, patched_config, write_configs
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.sizes import stored_bits
from dbrx_quant.runtime.tokenizer.ids import SpecialIds

IDS = SpecialIds(bos=257, eos=(257, 260), pad=258)
SUMMARY = Summary(bits=3.0, bpw=2.99951234, head_bits=6, rows=115, length=2048, dataset="default", ids=IDS)

# Every keyword of vLLM's own nested DBRX configs; it raises at any other.
VLLM_ATTENTION = {"attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"}
VLLM_FFN = {
    *("ffn_act_fn", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_jitter_eps", "moe_loss_weight"),
    *("moe_normalize_expert_weights", "uniform_expert_assignment"),
}


def test_quantization_config_has_exllamav2s_keys_and_the_reached_bits():
    block = patched_config(CONFIG, SUMMARY)["quantization_config"]
    assert block.pop("version").startswith("dbrx-quant ")
    assert block == {
        "quant_method": "exl2",
        "bits": 3.0,
        "bpw": 2.99951,
        "head_bits": 6,
        "calibration": {"rows": 115, "length": 2048, "dataset": "default"},
    }


def test_without_a_target_the_reached_bits_stand_in():
    summary = Summary(**{**SUMMARY.__dict__, "bits": None})
    assert patched_config(CONFIG, summary)["quantization_config"]["bits"] == 2.99951


def test_dbrx_names_its_rope_base_at_the_top_level_and_nested():
    config = patched_config(CONFIG, SUMMARY)
    assert config["rope_theta"] == config["attn_config"]["rope_theta"] == 500000


def test_transformers_alone_reads_the_right_rope_base(tmp_path):
    write_json(tmp_path / "config.json", patched_config(CONFIG, SUMMARY))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 500000


def test_a_dbrx_without_any_rope_base_is_refused():
    config = {**CONFIG, "attn_config": {"clip_qkv": 8, "kv_n_heads": 1}}
    with pytest.raises(CheckpointError, match="no rope_theta"):
        patched_config(config, SUMMARY)


def test_nested_configs_hold_only_keys_that_vllm_knows():
    noise = {"_name_or_path": "", "output_attentions": False, "hidden_size": 6144}
    config = {
        **CONFIG,
        "attn_config": CONFIG["attn_config"] | noise,
        "ffn_config": CONFIG["ffn_config"] | noise | {"ffn_act_fn": {"name": "silu"}},
    }
    patched = patched_config(config, SUMMARY)
    assert patched["attn_config"] == CONFIG["attn_config"]
    assert patched["ffn_config"] == CONFIG["ffn_config"] | {"ffn_act_fn": {"name": "silu"}}
    assert patched["attn_config"].keys() <= VLLM_ATTENTION
    assert patched["ffn_config"].keys() <= VLLM_FFN


def test_ids_are_filled_in_and_the_rest_is_kept():
    config = patched_config({**CONFIG, "auto_map": {"AutoConfig": "x.Y"}, "_name_or_path": "/a"}, SUMMARY)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (257, [257, 260], 258)
    for key in ("d_model", "max_seq_len", "torch_dtype", "vocab_size", "model_type", "tie_word_embeddings"):
        assert config[key] == CONFIG[key]
    assert not config.keys() & {"auto_map", "_name_or_path"}
    assert "quantization_config" not in CONFIG, "the source's config is left alone"


def test_unknown_ids_are_left_out_and_a_single_eos_stays_a_number():
    config = patched_config(CONFIG, Summary(**{**SUMMARY.__dict__, "ids": SpecialIds(None, (2,), None)}))
    assert config["eos_token_id"] == 2
    assert not config.keys() & {"bos_token_id", "pad_token_id"}


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ],
)
def test_other_families_pass_through(model_type, architecture):
    source = {"model_type": model_type, "architectures": [architecture], "rope_theta": 1e6, "num_experts": 8}
    config = patched_config(source, SUMMARY)
    added = {"bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"}
    assert config.keys() - source.keys() == added
    assert {key: config[key] for key in source} == source


@pytest.mark.parametrize("names", [None, [], ["A", "B"], ["AForCausalLM", "BForCausalLM"]])
def test_architectures_must_name_one(names):
    with pytest.raises(CheckpointError, match="architectures"):
        patched_config({**CONFIG, "architectures": names}, SUMMARY)


def test_of_several_architectures_the_causal_lm_is_kept():
    names = ["DbrxModel", "DbrxForCausalLM"]
    assert patched_config({**CONFIG, "architectures": names}, SUMMARY)["architectures"] == ["DbrxForCausalLM"]


def test_a_quantized_source_is_refused():
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(CheckpointError, match="quantized already"):
        patched_config(config, SUMMARY)


def test_generation_config_joins_the_sources_with_complete_ids():
    source = {"_from_model_config": True, "eos_token_id": 257, "temperature": 0.6, "do_sample": True}
    assert generation_config(source, IDS) == {
        "bos_token_id": 257,
        "eos_token_id": [257, 260],
        "pad_token_id": 258,
        "temperature": 0.6,
        "do_sample": True,
    }


def test_bits_are_counted_from_the_finished_shards(tmp_path):
    out = make_output(tmp_path)
    config = json.loads((out / "config.json").read_text())
    architecture = describe(load_config(out))
    checkpoint = architecture.open(out)
    stored = weights = 0
    for block in architecture.blocks:
        for spec in block.linears():
            stored += sum(8 * t.numel() * t.element_size() for t in checkpoint.linear(spec.name).values())
            weights += spec.shape[0] * spec.shape[1]
    assert config["quantization_config"]["bpw"] == pytest.approx(stored / weights, abs=1e-5)
    bits = stored_bits(checkpoint, architecture)
    assert bits.total_bytes == sum(
        t.numel() * t.element_size() for t in map(checkpoint.load, checkpoint.names())
    )
    head = checkpoint.linear("lm_head").values()
    assert bits.head_bits == sum(8 * t.numel() * t.element_size() for t in head)


def test_the_written_files_load_in_transformers(tmp_path):
    out = make_output(tmp_path)
    config = load_config(out)
    assert config.eos_token_id == [257, 260]
    assert config.rope_parameters["rope_theta"] == 500000
    assert config.quantization_config["quant_method"] == "exl2"
    assert getattr(config, "dtype", None) == torch.bfloat16
    assert GenerationConfig.from_pretrained(out).eos_token_id == [257, 260]


def test_notes_tell_which_ids_were_left_out(tmp_path):
    out = make_output(tmp_path)
    source = make_source(tmp_path / "source", config={**CONFIG, "eos_token_id": 5})
    notes = write_configs(
        source, out, describe(load_config(source)), bits=3.0, head_bits=6, rows=1, length=8, dataset="x"
    )
    assert notes == ["config.json: eos_token_id 5 is an ordinary token of the tokenizer, left out"]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [257, 260]
