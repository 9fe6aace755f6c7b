"""Folders that vLLM could not run are refused, with the reason, before anything is built."""

import json

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.vllm.opening import check_all_read, open_folder, plain_defaults


def edited(tmp_path, change):
    """A small DBRX whose config.json `change` has altered."""
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "model").path
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("ffn_config", "moe_normalize_expert_weights", 2.0, "vLLM computes as with 1"),
        ("ffn_config", "moe_normalize_expert_weights", None, "moe_normalize_expert_weights is None"),
        ("attn_config", "rope_theta", 10000.0, "RoPE base is 500000.0; vLLM reads 10000.0"),
    ],
)
def test_what_vllm_would_compute_differently_is_refused(tmp_path, section, key, value, message):
    folder = edited(tmp_path, lambda config: config[section].update({key: value}))
    with pytest.raises(CheckpointError, match=message):
        open_folder(folder)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    folder = edited(tmp_path, lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    with pytest.raises(CheckpointError, match="supported is one of DbrxForCausalLM"):
        open_folder(folder)


def test_a_damaged_linear_and_a_value_that_is_not_finite_are_refused(tmp_path):
    folder = build_quantized_folder(CONFIGS["llama"](), tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.q_invperm"
    kept = folder.tensors[name]
    folder.tensors[name] = torch.zeros_like(kept)
    with pytest.raises(CheckpointError, match="q_invperm"):
        open_folder(folder.write().path)
    folder.tensors[name] = kept
    folder.tensors["model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match="finite"):
        open_folder(folder.write().path)


def test_a_shard_that_the_index_does_not_name_is_refused_since_vllm_would_leave_it_out(tmp_path):
    folder = build_quantized_folder(CONFIGS["llama"](), tmp_path / "model").path
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    with pytest.raises(CheckpointError, match="dbrx-quant index"):
        open_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert open_folder(folder).contents.names


def test_shards_beside_consolidated_ones_are_refused_since_vllm_would_leave_them_out(tmp_path):
    with pytest.raises(CheckpointError, match=r"only consolidated\.00\.safetensors"):
        check_all_read(tmp_path, {"consolidated.00.safetensors", "model.safetensors"})


def test_defaults_that_vllm_sets_while_it_builds_do_not_reach_the_checks():
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), plain_defaults():
            assert (torch.empty(1).dtype, torch.empty(1).device.type) == (torch.float32, "cpu")
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
