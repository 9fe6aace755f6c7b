"""Every tensor of a real checkpoint of each family is found under its names, and nothing else let through."""

import ast
import re

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file, save_file
from small_configs import CONFIGS
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime.families import FAMILIES, describe, family_of
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import check_dense_source, load_bias, load_linear, module_linears
from dbrx_quant.runtime.files.errors import CheckpointError


@pytest.fixture(params=CONFIGS, scope="module")
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def test_a_real_checkpoint_is_described_whole(saved):
    _, folder = saved
    architecture = describe(load_config(folder))
    check_dense_source(architecture, architecture.open(folder))


def test_linears_and_floats_are_the_parameters_of_the_model(saved):
    model, folder = saved
    architecture = describe(load_config(folder))
    checkpoint = architecture.open(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for kept in architecture.all_floats():
        assert torch.equal(checkpoint.load(kept.name), parameters.pop(kept.parameter)), kept.name
    dense = [spec for block in architecture.blocks for stage in block.stages for spec in stage]
    for module, specs in module_linears([*dense, architecture.head]).items():
        weight = torch.cat([load_linear(checkpoint, spec) for spec in specs])
        assert torch.equal(weight, parameters.pop(f"{module}.weight")), module
        if specs[0].bias:
            bias = torch.cat([load_bias(checkpoint, spec) for spec in specs])
            assert torch.equal(bias, parameters.pop(f"{module}.bias")), module
    left = {name for name in parameters if ".experts." not in name}
    assert not left


def test_expert_weights_compute_what_the_model_computes(saved):
    model, folder = saved
    architecture = describe(load_config(folder))
    checkpoint = architecture.open(folder)
    x = torch.randn(5, architecture.hidden)
    for block in architecture.blocks:
        if block.experts is None:
            continue
        module = model.get_submodule(block.experts.module)
        for expert, linears in enumerate(block.experts.linears):
            gate, up, down = (load_linear(checkpoint, spec).float() for spec in linears)
            ours = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            index, weight = torch.full((5, 1), expert), torch.ones(5, 1)
            theirs = module(x[None] if architecture.family == "dbrx" else x, index, weight).view(5, -1)
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
        ({"num_experts": 0}, []),
    ],
)
@pytest.mark.parametrize("family", ["qwen2 moe", "qwen3 moe"])
def test_blocks_have_experts_where_transformers_gives_them_some(family, settings, sparse):
    config = CONFIGS[family]()
    for key, value in ({"num_hidden_layers": 4, "mlp_only_layers": []} | settings).items():
        setattr(config, key, value)
    config.layer_types = ["full_attention"] * 4
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    architecture = describe(config)
    assert [block.index for block in architecture.blocks if block.experts] == sparse
    assert [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")] == sparse


def test_a_shared_expert_is_an_ordinary_linear_with_roles_of_its_own():
    config = CONFIGS["qwen2 moe"]()
    config.architectures = ["Qwen2MoeForCausalLM"]
    block = describe(config).blocks[0]
    assert [[spec.role for spec in stage] for stage in block.stages] == [
        ["q", "k", "v"],
        ["o"],
        ["shared_gate", "shared_up"],
        ["shared_down"],
    ]
    shared = [spec for stage in block.stages[2:] for spec in stage]
    names = [f"model.layers.0.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    assert [(spec.name, spec.expert) for spec in shared] == [(name, None) for name in names]
    assert not block.only_routed


def test_a_per_expert_dbrx_checkpoint_gives_the_same_weights(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["dbrx"]())
    model.save_pretrained(tmp_path / "fused")
    tensors = load_file(tmp_path / "fused" / "model.safetensors")
    split = {}
    for name, tensor in tensors.items():
        if ".experts.mlp." not in name:
            split[name] = tensor
            continue
        prefix, key = name.rsplit(".", 1)
        for expert, rows in enumerate(tensor.split(96)):
            split[f"{prefix}.{expert}.{key}.weight"] = (rows.T if key == "w2" else rows).contiguous()
    (tmp_path / "split").mkdir()
    save_file(split, tmp_path / "split" / "model.safetensors")
    architecture = describe(load_config(tmp_path / "fused"))
    fused, converted = architecture.open(tmp_path / "fused"), architecture.open(tmp_path / "split")
    check_dense_source(architecture, converted)
    for spec in architecture.linears():
        assert torch.equal(load_linear(fused, spec), load_linear(converted, spec)), spec.name


def altered(tmp_path, change):
    AutoModelForCausalLM.from_config(CONFIGS["dbrx"]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    architecture = describe(load_config(tmp_path))
    return architecture, architecture.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.blocks.1.ffn.experts.mlp.v1"),
            "no weight for .*layers.1.*experts.0.v1",
        ),
        (
            lambda t: t.pop("transformer.blocks.0.ffn.router.layer.weight"),
            "no tensor .*layers.0.block_sparse_moe.gate",
        ),
        (lambda t: t.update(surprise=torch.zeros(1)), "tensors that do not belong to a dbrx model: surprise"),
        (
            lambda t: t.update({"transformer.blocks.0.ffn.experts.mlp.w1": torch.zeros(4 * 96, 60)}),
            r"experts.w1: shape \(384, 60\) does not hold .*experts.0.w1",
        ),
    ],
)
def test_a_checkpoint_that_only_partly_fits_is_refused_by_tensor(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        check_dense_source(*altered(tmp_path, change))


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel.*DbrxForCausalLM"):
        describe(load_config(tmp_path))


def test_the_rope_base_of_dbrx_is_read_from_where_the_hub_keeps_it(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "attn_config": {"rope_theta": 500000}}'
    )
    assert load_config(tmp_path).rope_parameters["rope_theta"] == 500000.0


def test_a_family_is_found_by_the_model_type_of_a_configuration():
    for family in FAMILIES:
        assert family_of(family.name) is family
    other = family_of("gpt2")
    assert other.patch_config({"a": 1}) == {"a": 1}
    assert (other.config_problems({}), other.fix_config, other.layer_parts) == ([], None, None)


OUTSIDE = [
    path
    for layer in ("runtime", "calibration", "quantize")
    for path in sorted((ROOT / layer).rglob("*.py"))
    if "families" not in path.parts
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_outside_the_families_names_one(path):
    classes = "|".join(name.removesuffix("ForCausalLM") for f in FAMILIES for name in f.architectures)
    named = re.compile(rf"({'|'.join(f.name for f in FAMILIES)})|.*\b({classes})[A-Z]?.*")
    texts = [
        n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)
    ]
    assert [text for text in texts if isinstance(text, str) and named.fullmatch(text)] == []
