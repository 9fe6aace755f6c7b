"""QuantLinear, FusedLinear and QuantExperts: names, loading, dtypes, torch.compile, transformers' results."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracles_ops as oracle
from dbrx_quant.runtime.kernels.activations import activation_name, use_activations
from dbrx_quant.runtime.model.experts import QuantExperts
from dbrx_quant.runtime.model.linear import FusedLinear, QuantLinear

D, F, E, A = 64, 96, 4, 2

pytestmark = pytest.mark.usefixtures("seeded")


def quant_linear(k, n, seed=0, out_features=None, bias=False):
    tensors = oracle.random_tensors([(5, 32), (3, k - 32)], n, seed, bias, scale=0.05)
    return QuantLinear.from_tensors(tensors, out_features)


def quant_experts(**options):
    return QuantExperts(
        [
            (quant_linear(D, F, 3 * e), quant_linear(D, F, 3 * e + 1), quant_linear(F, D, 3 * e + 2))
            for e in range(E)
        ],
        **options,
    )


def routing(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E, generator=generator)[:A] for _ in range(tokens)])
    return index, torch.rand(tokens, A, generator=generator)


def test_a_layer_built_from_sizes_is_filled_by_assignment_without_a_copy():
    tensors = oracle.random_tensors([(5, 32), (3, 64)], 96, bias=True)
    layer = QuantLinear(96, 72, word_rows=11, groups=2, bias=True, device="meta")
    assert {name: (b.dtype, b.shape) for name, b in layer.named_buffers()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    layer.load_state_dict(tensors, assign=True)
    assert all(layer.get_buffer(name).data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    x = torch.randn(2, 3, 96)
    exact = oracle.linear(x.view(6, 96), tensors, 72).view(2, 3, 72)
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)


def test_memory_mapped_tensors_are_used_in_place(tmp_path):
    tensors = oracle.random_tensors([(5, 32), (3, 64)], 64)
    save_file(tensors, tmp_path / "linear.safetensors")
    mapped = load_file(tmp_path / "linear.safetensors")
    layer = QuantLinear.from_tensors(mapped)
    assert layer.q_weight.data_ptr() == mapped["q_weight"].data_ptr()
    assert torch.equal(layer(torch.ones(1, 96)), QuantLinear.from_tensors(tensors)(torch.ones(1, 96)))


def test_from_tensors_refuses_a_width_of_other_padding():
    tensors = oracle.random_tensors([(4, 32)], 96)
    with pytest.raises(ValueError, match="60 output features do not fit 96"):
        QuantLinear.from_tensors(tensors, 60)


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half()]
)
def test_casting_a_module_leaves_the_stored_bits_alone(convert):
    layer = quant_linear(64, 64, bias=True)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    convert(torch.nn.Sequential(layer))
    for name, tensor in layer.tensors().items():
        assert oracle.first_difference(tensor, before[name]) is None, name


def test_fused_linear_puts_its_parts_side_by_side():
    parts = {"q_proj": quant_linear(64, 96, 1), "k_proj": quant_linear(64, 32, 2, out_features=20)}
    fused = FusedLinear(parts)
    x = torch.randn(3, 64)
    assert fused.out_features == 116
    assert torch.equal(fused(x), torch.cat([layer(x) for layer in parts.values()], -1))
    assert "k_proj.q_scale_max" in fused.state_dict()
    with pytest.raises(ValueError, match="expected one width"):
        FusedLinear({"a": quant_linear(64, 32), "b": quant_linear(96, 32)})


@pytest.mark.parametrize("mode", ["int8", "int16", "float"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_fused_linears_give_the_bits_of_each_alone(mode, tokens):
    parts = {name: quant_linear(96, 64, seed, bias=seed > 1) for seed, name in enumerate("qkv")}
    # one that reads its input in the same order, so that they share the rounded one
    parts["same"] = QuantLinear.from_tensors(parts["q"].tensors())
    with use_activations(mode):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, 96).to(dtype)
            expected = torch.cat([layer(x) for layer in parts.values()], -1)
            assert torch.equal(FusedLinear(parts)(x), expected)


def test_fused_linears_with_a_dense_or_hooked_part_run_one_by_one():
    parts = {"q": quant_linear(64, 96), "k": quant_linear(64, 32), "v": torch.nn.Linear(64, 32)}
    x = torch.randn(3, 64)
    assert torch.equal(FusedLinear(parts)(x), torch.cat([layer(x) for layer in parts.values()], -1))
    del parts["v"]
    parts["k"].register_forward_hook(lambda module, inputs, output: 0 * output)
    assert FusedLinear(parts)(x)[:, 96:].abs().max() == 0


def test_experts_name_their_buffers_as_the_file_does():
    names = [name for name, _ in quant_experts(keys=("w1", "v1", "w2")).named_buffers()]
    assert len(names) == E * 3 * 5
    assert names[0] == "0.w1.q_weight"
    assert "3.w2.q_invperm" in names


def test_experts_refuse_what_does_not_fit():
    linear = quant_linear(D, F)
    with pytest.raises(ValueError, match="expert 0"):
        QuantExperts([(linear, linear, linear)])
    with pytest.raises(ValueError, match="has a bias"):
        QuantExperts([(linear, quant_linear(D, F, bias=True), quant_linear(F, D))])
    with pytest.raises(ValueError, match="at least one"):
        QuantExperts([])
    with pytest.raises(ValueError, match="'mish' is not supported"):
        activation_name("mish")


def test_experts_equal_dbrx_experts_with_the_dense_weights():
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    ours = quant_experts()
    config = DbrxFFNConfig(hidden_size=D, ffn_hidden_size=F, moe_num_experts=E, moe_top_k=A)
    config.hidden_size = D
    theirs = DbrxExperts(config)
    dense = {
        key: [oracle.dequantize(ours.linear(e, key).tensors()).float() for e in range(E)]
        for key in ("w1", "v1", "w2")
    }
    theirs.mlp.w1.data = torch.cat([weight.t() for weight in dense["w1"]])
    theirs.mlp.v1.data = torch.cat([weight.t() for weight in dense["v1"]])
    theirs.mlp.w2.data = torch.cat(dense["w2"])  # (in, out) on the Hub too
    x = torch.randn(2, 5, D)
    index, weights = routing(10)
    with torch.no_grad():
        wanted = theirs(x, index, weights)
        found = ours(x, index, weights)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)


def test_experts_equal_mixtral_experts_with_the_dense_weights():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    ours = quant_experts(keys=("w1", "w3", "w2"))
    theirs = MixtralExperts(MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E))
    for e in range(E):
        gate, up, down = (oracle.dequantize(ours.linear(e, key).tensors()).float().t() for key in ours.keys)
        theirs.gate_up_proj.data[e] = torch.cat([gate, up])
        theirs.down_proj.data[e] = down
    x = torch.randn(7, D)
    index, weights = routing(7)
    index[2, 0] = index[5] = E  # "no expert"
    with torch.no_grad():
        wanted = theirs(x, index, weights)
        found = ours(x, index, weights)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)


def test_experts_keep_the_dtype_of_the_states():
    ours = quant_experts()
    index, weights = routing(3)
    x = torch.randn(3, D).bfloat16()
    y = ours(x, index, weights.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ours(x.float(), index, weights.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_modules_compile_into_one_graph(backend):
    torch._dynamo.reset()
    layer, experts = quant_linear(D, 96, out_features=70, bias=True), quant_experts()

    def step(x, index, weights):
        return layer(torch.nn.functional.silu(x)), experts(x, index, weights)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 6):
            x = torch.randn(tokens, D)
            index, weights = routing(tokens)
            for found, wanted in zip(compiled(x, index, weights), step(x, index, weights), strict=True):
                assert torch.allclose(found, wanted, atol=1e-6)


def test_compiled_modules_see_buffers_that_are_replaced_later():
    torch._dynamo.reset()
    experts = quant_experts()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, (index, weights) = torch.randn(3, D), routing(3)
    with torch.no_grad():
        compiled(x, index, weights)
        other = oracle.random_tensors([(5, 32), (3, F - 32)], D, seed=99, scale=0.05)
        experts.linear(int(index[0, 0]), "w2").load_state_dict(other, assign=True)
        assert torch.allclose(compiled(x, index, weights), experts(x, index, weights), atol=1e-6)
