"""Native steps on a GPU, which the emulator plays: what transformers gives from exact weights on the CPU."""

import copy

import pytest
import torch
from emulated import launches, play_gpu
from quant_models import CONFIGS, build_quantized_folder, made_once
from transformers import DynamicCache

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.step import kv_cache
from dbrx_quant.runtime.step.byte_cache import ByteLayer
from dbrx_quant.runtime.step.cache_bits import cache_bits, use_cache_bits
from dbrx_quant.runtime.step.cpu_step import CpuStep
from dbrx_quant.runtime.step.gpu_step import GpuStep
from dbrx_quant.runtime.step.native_step import NativeForward, use_native_step
from dbrx_quant.runtime.step.run_ahead import run_ahead
from dbrx_quant.runtime.step.sampling import Sampling

FAMILIES = ("dbrx", "llama", "mixtral", "qwen3 moe")
PROMPT = torch.arange(20)[None] * 7 % 128
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {FP32: 1e-4, HALF: 1e-2, BF16: 0.1}  # of the logits' deviation


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_once(
        lambda name: build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model")).path
    )


@pytest.fixture(scope="module")
def on_cpu(folders):
    """Models in fp32 on the CPU. To be used before anything is on the GPU."""
    return made_once(lambda name: load_model(folders(name)))


@pytest.fixture
def on_gpu(emulated, monkeypatch, folders):
    """Loads a model to the GPU, and has everything run there from now on."""

    def model(name, dtype=FP32):
        play_gpu(monkeypatch)
        return load_model(folders(name), dtype=dtype)

    return model


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of a decoder was a native step on the GPU, call after call."""
    calls, step = [], NativeForward._step

    def watched(self, **arguments):
        states = step(self, **arguments)
        calls.append(states is not None and isinstance(self._form.step, GpuStep))
        return states

    monkeypatch.setattr(NativeForward, "_step", watched)
    return calls


@torch.no_grad()
def feed(model, *pieces, native=True, cache=None, prompt=PROMPT):
    """The logits of all tokens, fed piece by piece, so many tokens at a time, with a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, at = [], cache.get_seq_length()
    with use_native_step(native):
        for piece in pieces:
            ids = prompt[:, at : at + piece]
            out.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits.float())
            at += piece
    return torch.cat(out, dim=1)


def assert_close(found, expected, tolerance=TOLERANCE[FP32]):
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.std()
    assert error < tolerance, error.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_equal_exact_ones_of_transformers(name, on_cpu, on_gpu, taken):
    expected = feed(on_cpu(name), 16)
    taken.clear()
    assert_close(feed(on_gpu(name), 8, 1, 1, 1, 4, 1), expected)
    assert taken == [True] * 6


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_steps_in_half_precision_are_close_to_exact_ones(dtype, on_cpu, on_gpu, taken):
    expected = feed(on_cpu("dbrx"), 12)
    model = on_gpu("dbrx", dtype)
    cache = DynamicCache(config=model.config)
    assert_close(feed(model, 8, 1, 1, 1, 1, cache=cache), expected, TOLERANCE[dtype])
    assert all(taken[-5:])
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}


@pytest.mark.parametrize(("name", "sequences"), [("qwen3 moe", 2), ("dbrx", 3), ("llama", 8)])
def test_sequences_side_by_side_equal_transformers(name, sequences, on_cpu, on_gpu, taken):
    prompt = torch.randint(0, 128, (sequences, 4), generator=torch.Generator().manual_seed(1))
    expected = feed(on_cpu(name), 4, prompt=prompt)
    taken.clear()
    assert_close(feed(on_gpu(name), 1, 1, 1, 1, prompt=prompt), expected)
    assert taken == [True] * 4


def test_a_prompt_of_more_tokens_goes_through_transformers_into_the_same_cache(on_cpu, on_gpu, taken):
    expected = feed(on_cpu("mixtral"), 12)
    taken.clear()
    assert_close(feed(on_gpu("mixtral"), 9, 1, 2), expected)
    assert taken == [False, True, True]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_the_cpus_steps(name, on_cpu, on_gpu, taken, monkeypatch):
    def generate(model):
        model.generation_config.eos_token_id = None
        return model.generate(PROMPT[:, :7], max_new_tokens=5, do_sample=False)[0].tolist()

    plain = generate(on_cpu(name))
    steps, run = [], CpuStep.run
    monkeypatch.setattr(CpuStep, "run", lambda *arguments: steps.append(run(*arguments)) or steps[-1])
    with use_activations("int16"):
        assert generate(on_cpu(name)) == plain
    assert len(steps) == 5
    taken.clear()
    model = on_gpu(name)
    assert generate(model) == plain
    assert taken == [True] * 5
    cache = DynamicCache(config=model.config)
    feed(model, 6, cache=cache)
    assert run_ahead(model, PROMPT[:, 6:7], cache, 5).tolist() == [plain[7:]]
    assert cache.get_seq_length() == 11


# ---- Graphs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "dbrx"])
def test_a_layer_takes_five_launches_and_from_the_third_step_on_a_graph_does(name, on_gpu, emulated):
    model = on_gpu(name, HALF)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def launched(at):
        launches(emulated)
        model.base_model(input_ids=PROMPT[:, at : at + 1], past_key_values=cache, use_cache=True)
        return launches(emulated)

    layer = ["FewLinears", "Attention", "FewLinears", "FewGateUp", "FewDown"]
    step = ["Embed", *layer * model.config.num_hidden_layers, "Normalise"]
    assert launched(0) == step
    assert launched(1) == step  # captured
    assert launched(2) == []


def test_graphs_serve_every_cache_and_follow_one_that_grows(on_cpu, on_gpu, taken, emulated, monkeypatch):
    other = PROMPT.flip(1).contiguous()
    expected = feed(on_cpu("llama"), 14), feed(on_cpu("llama"), 14, prompt=other)
    monkeypatch.setattr(kv_cache, "_LEAST_ROOM", 4)
    model, taken[:] = on_gpu("llama"), []
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    found = [[], []]
    for at in range(14):
        if at == 3:
            launches(emulated)
        for i, prompt in enumerate((PROMPT, other)):
            found[i].append(feed(model, 1, cache=caches[i], prompt=prompt))
    assert all(taken)
    assert "Attention" not in launches(emulated)
    assert caches[0].layers[0].place((1, 2, 16), FP32, 14, torch.device("cpu"))[2] < 25
    for logits, wanted in zip(found, expected, strict=True):
        assert_close(torch.cat(logits, 1), wanted)


def test_longer_caches_than_there_were_rotations_for_get_new_ones(on_cpu, on_gpu, emulated):
    expected = feed(on_cpu("llama"), 4)
    model = on_gpu("llama")
    feed(model, 1, 1, 1)
    step = model.base_model.forward.gpu_step()
    before = step._decoder.cosines
    cache = DynamicCache(config=model.config)
    cache.layers[:] = [kv_cache.GrowingLayer() for _ in cache.layers or range(2)]
    for layer in cache.layers:
        layer.place((1, 2, 16), FP32, 300, torch.device("cpu"))
    assert_close(feed(model, 1, 1, 1, 1, cache=cache), expected)
    assert step._decoder.cosines != before


# ---- Caches in bytes --------------------------------------------------------------------------------------


def test_a_cache_of_bytes_is_close_and_may_come_and_go(on_cpu, on_gpu, taken):
    expected = feed(on_cpu("dbrx"), 14)
    model = on_gpu("dbrx")
    cache = DynamicCache(config=model.config)
    taken.clear()
    with use_cache_bits(8):
        found = [feed(model, 5, 1, 1, cache=cache)]
        assert {type(layer) for layer in cache.layers} == {ByteLayer}
        found.append(feed(model, 2, native=False, cache=cache))
        found.append(feed(model, 1, cache=cache))
        cache.crop(-1)
        assert torch.equal(feed(model, 1, cache=cache), found[-1])
    found.append(feed(model, 3, 1, cache=cache))
    assert {type(layer) for layer in cache.layers} == {kv_cache.GrowingLayer}
    assert taken == [True] * 3 + [False] + [True] * 4
    assert_close(torch.cat(found, 1), expected, 0.05)


def test_bits_of_a_cache_are_8_or_16(monkeypatch):
    with pytest.raises(ValueError, match="cache bits: 4, expected 8 or 16"), use_cache_bits(4):
        pass
    monkeypatch.setattr("dbrx_quant.runtime.step.cache_bits._cache_bits", None)
    monkeypatch.setenv("DBRXQ_CACHE_BITS", "2")
    with pytest.raises(ValueError, match="DBRXQ_CACHE_BITS: '2', expected 8 or 16"):
        cache_bits()


# ---- Tokens without the host ------------------------------------------------------------------------------


def test_sampled_tokens_are_the_same_for_a_seed_and_those_of_one_likely_token_greedy(on_gpu):
    model = on_gpu("llama")

    def tokens(**how):
        cache = DynamicCache(config=model.config)
        return run_ahead(model, PROMPT[:, :1].expand(2, -1), cache, 4, Sampling(**how)).tolist()

    greedy = tokens()
    assert greedy[0] == greedy[1]
    assert tokens(temperature=2.0, top_k=1, seed=7) == greedy
    warm = tokens(temperature=5.0, seed=7)
    assert tokens(temperature=5.0, seed=7) == warm != greedy
    assert warm[0] != warm[1]


def test_bad_requests_for_tokens_are_refused(on_gpu):
    model = on_gpu("llama")
    with pytest.raises(ValueError, match=r"ids \(1, 2\), count 3"):
        run_ahead(model, PROMPT[:, :2], DynamicCache(), 3)
    with pytest.raises(ValueError, match=r"top_p 0\.0 is out of bounds"):
        Sampling(top_p=0.0)


# ---- What is left to transformers -------------------------------------------------------------------------


def change_norm(model):
    model.model.layers[0].input_layernorm.weight.data.mul_(2)


def swap_parts(model):
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


@pytest.mark.parametrize("change", [change_norm, swap_parts])
def test_a_model_that_changed_is_noticed_behind_the_step(change, on_cpu, on_gpu, taken):
    changed = copy.deepcopy(on_cpu("llama"))
    change(changed)
    expected = feed(changed, 4)
    model = on_gpu("llama")
    before = feed(model, 4)
    change(model)
    after = feed(model, 4)
    assert taken[-2:] == [True, True]
    assert (after - before).abs().max() > 0.1
    assert_close(after, expected)


def test_padding_hooks_and_the_switch_leave_steps_to_transformers(on_gpu, taken):
    model = on_gpu("llama")
    feed(model, 4)
    mask = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        model(PROMPT[:, :4], attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
        mask[0, 0] = 0
        model(PROMPT[:, :4], attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    feed(model, 4, native=False)
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    feed(model, 4)
    assert taken == [True, True, False, False, False]


def test_biased_feed_forward_parts_are_left_to_transformers(on_gpu, taken):
    model = on_gpu("llama tied and biased")  # of attention: these are known
    feed(model, 4)
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = torch.zeros(linear.q_weight.shape[1] * linear.q_weight.shape[2], dtype=HALF)
    feed(model, 4)
    assert taken == [True, False]
