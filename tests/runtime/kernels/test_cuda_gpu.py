"""The CUDA kernels on a real GPU, through the operators: skipped where there is none.

The same kernels run everywhere on the emulator, in the other test_cuda files; here is what only a device can
show.
"""

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from transformers import DynamicCache

import oracles_ops as oracle
from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.kernels import ops
from dbrx_quant.runtime.library import _cuda
from dbrx_quant.runtime.model.linear import QuantLinear
from dbrx_quant.runtime.step.cache_bits import use_cache_bits
from dbrx_quant.runtime.step.native_step import use_native_step
from dbrx_quant.runtime.step.run_ahead import run_ahead

WIDTHS = (8, 6, 5, 4, 3, 2)


def why_not():
    if not torch.cuda.is_available():
        return "no CUDA GPU, or a torch without CUDA"
    return _cuda.why_unavailable(torch.device("cuda"))


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
MIXED = [(8, 32), (6, 64), (5, 64), (4, 128), (3, 448), (2, 304)]


def on_gpu(tensors):
    return {suffix: tensor.cuda() for suffix, tensor in tensors.items()}


def random_experts(count, hidden=256, ffn=416):
    return [
        tuple(
            oracle.random_tensors([(WIDTHS[(e + role) % 5], 32), (2, k - 32)], n, seed=3 * e + role)
            for role, (k, n) in enumerate(((hidden, ffn), (hidden, ffn), (ffn, hidden)))
        )
        for e in range(count)
    ]


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_are_exact(bits):
    tensors = oracle.random_tensors([(bits, 64), (bits, 32)], 160, scale=0.5)
    ours = ops.dequantize(on_gpu(tensors)).t().cpu()
    assert oracle.first_difference(ours, oracle.dequantize(tensors)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 64, 200])
def test_linear_is_as_accurate_as_torch(tokens, dtype):
    tensors = oracle.random_tensors(MIXED, 1056, bias=True)
    x = torch.randn(tokens, 1040).to(dtype)
    ours = ops.linear(x.cuda(), on_gpu(tensors)).cpu()
    exact = oracle.linear(x, tensors, 1056)
    if dtype == torch.float32:
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    else:
        plain = oracle.linear(x, tensors, 1056, torch.float32).to(dtype)
        assert oracle.rms(ours.double() - exact) <= 2 * oracle.rms(plain.double() - exact)


@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
def test_experts_agree_with_the_oracle(tokens):
    linears = random_experts(6)
    gate, up, down = ([on_gpu(t) for t in role] for role in zip(*linears, strict=True))
    x, index, weights = (
        torch.randn(tokens, 256).half(),
        torch.randint(0, 7, (tokens, 2)),
        torch.rand(tokens, 2),
    )
    ours = ops.experts(x.cuda(), index.cuda(), weights.cuda(), gate, up, down).cpu()
    exact = oracle.experts(x, index, weights, linears, "silu")
    assert torch.allclose(ours.double(), exact, rtol=1e-2, atol=2e-3 * exact.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_captured_graph_follows_new_inputs_and_new_routing(tokens):
    linears = random_experts(4)
    gate, up, down = ([on_gpu(t) for t in role] for role in zip(*linears, strict=True))
    head = on_gpu(oracle.random_tensors([(4, 256)], 320))
    x = torch.zeros(tokens, 256, dtype=torch.float16, device="cuda")
    index = torch.zeros(tokens, 2, dtype=torch.int64, device="cuda")
    weights = torch.ones(tokens, 2, device="cuda")

    def step():
        return ops.linear(ops.experts(x, index, weights, gate, up, down), head)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(tokens, 256, generator=generator))
        index.copy_(torch.randint(0, 5, (tokens, 2), generator=generator))
        graph.replay()
        assert torch.equal(y, step())


def test_a_layer_holds_its_words_once_and_gives_them_back():
    tensors = oracle.random_tensors([(4, 2048)], 8192)
    size = tensors["q_weight"].nbytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    layer = QuantLinear.from_tensors(tensors).cuda()
    layer(torch.ones(1, 2048, dtype=torch.float16, device="cuda"))
    assert torch.cuda.memory_allocated() - before < 1.5 * size
    for ours in (layer.state_dict(), layer.cpu().state_dict()):
        assert torch.equal(ours["q_weight"].cpu(), tensors["q_weight"])


def test_repetitions_change_no_bit():
    tensors = on_gpu(oracle.random_tensors(MIXED, 1056))
    for tokens in (1, 12, 70):
        x = torch.randn(tokens, 1040, device="cuda").half()
        first = ops.linear(x, tensors)
        assert all(torch.equal(ops.linear(x, tensors), first) for _ in range(20))


@pytest.mark.parametrize("name", ["dbrx", "llama", "qwen3 moe"])
def test_steps_and_their_graphs_equal_those_of_transformers(name, tmp_path):
    model = load_model(
        build_quantized_folder(CONFIGS[name](), tmp_path).path, device="cuda", dtype=torch.float32
    )
    ids = (torch.arange(40)[None] * 7 % 128).cuda()

    @torch.no_grad()
    def logits(native):
        cache, out, at = DynamicCache(config=model.config), [], 0
        with use_native_step(native):
            for piece in (9, 1, 1, 1, 4, 4, 4, 1, 1):
                out.append(model(ids[:, at : at + piece], past_key_values=cache, use_cache=True).logits)
                at += piece
        assert all(hasattr(layer, "place") for layer in cache.layers) == native
        return torch.cat(out, dim=1)

    plain = logits(native=False)
    assert (logits(native=True) - plain).abs().max() < 1e-3 * plain.std()
    with use_cache_bits(8):
        assert (logits(native=True) - plain).abs().max() < 0.1 * plain.std()
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids[:, :12], max_new_tokens=8, do_sample=False)[:, 12:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache, use_cache=True)
    assert torch.equal(run_ahead(model, ids[:, 11:12], cache, 8), wanted)
