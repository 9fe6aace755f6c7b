"""vLLM's names: every layer finds its linears, every other tensor its parameter."""

import pytest
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.vllm.opening import open_folder
from dbrx_quant.runtime.vllm.places import stored_names


def opened(tmp_path, family, **options):
    return open_folder(build_quantized_folder(CONFIGS[family](), tmp_path / "model", **options).path)


def names(specs):
    return [spec.name for spec in specs]


def test_a_fused_layer_of_vllm_holds_the_linears_that_it_fuses_in_their_order(tmp_path):
    places = opened(tmp_path, "llama").places
    parent = "model.layers.1.self_attn"
    assert names(places.linears(f"{parent}.qkv_proj", {})) == [f"{parent}.{r}_proj" for r in "qkv"]
    assert names(places.linears(f"{parent}.o_proj", {})) == [f"{parent}.o_proj"]
    assert names(places.linears("lm_head", {})) == ["lm_head"]


def test_a_class_of_vllm_may_fuse_otherwise(tmp_path):
    places = opened(tmp_path, "llama").places
    parent = "model.layers.0.self_attn"
    found = places.linears(f"{parent}.kv_proj", {"kv_proj": ["k_proj", "v_proj"]})
    assert names(found) == [f"{parent}.k_proj", f"{parent}.v_proj"]


def test_dbrx_layers_are_found_by_transformers_names(tmp_path):
    places = opened(tmp_path, "dbrx").places
    attention = "transformer.blocks.0.norm_attn_norm.attn"
    assert names(places.linears(f"{attention}.Wqkv", {})) == [
        f"model.layers.0.self_attn.{role}_proj" for role in "qkv"
    ]
    experts = places.experts("transformer.blocks.1.ffn")
    assert experts.linears[3][2].name == "model.layers.1.block_sparse_moe.experts.3.w2"


def test_a_shared_expert_is_linears_and_its_gate_and_the_router_stay_dense(tmp_path):
    places = opened(tmp_path, "qwen2 moe").places
    shared = "model.layers.0.mlp.shared_expert"
    assert names(places.linears(f"{shared}.gate_up_proj", {})) == [
        f"{shared}.gate_proj",
        f"{shared}.up_proj",
    ]
    for router in ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"):
        assert places.linears(router, {}) == ()
        assert places.stays_dense(router)


def test_a_layer_that_the_file_does_not_have_is_neither_a_linear_nor_a_router(tmp_path):
    places = opened(tmp_path, "qwen3 moe").places
    assert places.linears("model.layers.7.self_attn.qkv_proj", {}) == ()
    assert not places.stays_dense("model.layers.0.self_attn.qkv_proj")
    assert places.experts("model.layers.1.mlp.experts") is None  # a dense block


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_that_is_not_packed_has_a_name_or_goes_with_its_linear(tmp_path, family):
    found = opened(tmp_path, family, head=False)
    floats = list(found.contents.architecture.all_floats())
    given = {name for name in found.names.values() if name is not None}
    by_module = family_of(found.contents.architecture.family).vllm_by_module
    expected = {kept.parameter if by_module else kept.name for kept in floats}
    if not found.contents.architecture.tied:
        expected.add("lm_head.weight")
    assert given == expected
    left = {name for name, ours in found.names.items() if ours is None}
    assert left == {f"{s.name}.bias" for s in found.contents.architecture.linears() if s.bias}


def test_names_are_those_that_the_file_has_whatever_we_call_them(tmp_path):
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "model")
    folder.tensors["transformer.norm_f.weight"] = folder.tensors.pop("model.norm.weight")
    folder.write()
    contents = open_folder(folder.path).contents
    assert stored_names(contents, True)["transformer.norm_f.weight"] == "transformer.norm_f.weight"
    assert stored_names(contents, False)["transformer.norm_f.weight"] == "model.norm.weight"
