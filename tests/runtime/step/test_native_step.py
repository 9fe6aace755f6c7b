"""Native decoder steps give what transformers' own code gives, in every family, with every cache."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder, made_once
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import DynamicLayer

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.families import llama_like
from dbrx_quant.runtime.families.parts import UnknownPartError
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.step.kv_cache import GrowingLayer
from dbrx_quant.runtime.step.native_step import NativeForward, native_step_enabled, use_native_step

SHARED = "qwen2 moe"  # whose shared expert the native step does not know
CONFIGS = CONFIGS | {"mistral": lambda: small_mistral(None)}
NATIVE = [name for name in CONFIGS if name != SHARED]
PROMPT = torch.arange(20)[None] * 7 % 128
TOLERANCE = (
    2e-3  # of the logits' deviation: two bytes of activations round at 3e-5, and differently after each sum
)


def small_mistral(window):
    return MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )


@pytest.fixture(autouse=True)
def rounded_activations():
    with use_activations("int16"):
        yield


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of a decoder was a native step, call after call."""
    calls, step = [], NativeForward._step

    def watched(self, **arguments):
        states = step(self, **arguments)
        calls.append(states is not None)
        return states

    monkeypatch.setattr(NativeForward, "_step", watched)
    return calls


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_once(
        lambda name: build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model")).path
    )


@pytest.fixture(scope="module")
def models(folders):
    made = {}

    def model(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = load_model(folders(name), dtype=dtype)
        return made[name, dtype]

    return model


@pytest.fixture
def llama(folders):
    """A model that a test may change."""
    return load_model(folders("llama"))


@torch.no_grad()
def feed(model, *pieces, cache=None, **options):
    """The logits of all tokens, fed piece by piece with a cache; a piece is a number of tokens, or ids."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, at = [], cache.get_seq_length()
    for piece in pieces:
        ids = PROMPT[:, at : at + piece] if isinstance(piece, int) else piece
        out.append(model(ids, past_key_values=cache, use_cache=True, **options).logits.float())
        at += ids.shape[1]
    return torch.cat(out, dim=1)


def ordinary(model, *pieces, **options):
    with use_native_step(False):
        return feed(model, *pieces, **options)


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.std()
    assert error < tolerance, error.item()


@pytest.mark.parametrize("mode", ["int8", "int16"])
@pytest.mark.parametrize("name", NATIVE)
def test_steps_equal_those_of_transformers(name, mode, models, taken):
    model = models(name)
    with use_activations(mode):
        expected = ordinary(model, 9, 1, 1, 4, 5)
        taken.clear()
        found = feed(model, 9, 1, 1, 4, 5)
    assert taken == [False, True, True, True, True]  # 9 tokens are more than a step takes
    assert_close(found, expected, TOLERANCE if mode == "int16" else 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dbrx", "qwen2", "qwen3"])
def test_steps_in_half_precision_are_as_exact_as_those_of_transformers(name, dtype, models, taken):
    exact = ordinary(models(name), 8, 1, 1, 8)
    model = models(name, dtype)
    plain = ordinary(model, 8, 1, 1, 8)
    taken.clear()
    cache = DynamicCache(config=model.config)
    found = feed(model, 8, 1, 1, 8, cache=cache)
    assert taken == [True] * 4
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    error, yardstick = ((y - exact).square().mean().sqrt() for y in (found, plain))
    assert error < 2 * yardstick


@pytest.mark.parametrize("name", ["dbrx", "llama", "qwen3 moe"])
def test_generation_is_that_of_transformers_with_every_cache(name, models, taken):
    model = models(name)
    model.generation_config.eos_token_id = None

    def generate(**options):
        return model.generate(PROMPT, max_new_tokens=12, do_sample=False, **options)[0].tolist()

    with use_native_step(False):
        expected, beams = generate(), generate(num_beams=3)
    taken.clear()
    assert generate() == expected
    assert taken == [False] + [True] * 11
    assert generate(prompt_lookup_num_tokens=3) == expected
    assert generate(assistant_model=model) == expected
    assert generate(num_beams=3) == beams
    assert all(taken[-11:])
    taken.clear()
    assert generate(cache_implementation="static") == expected
    assert generate(use_cache=False) == expected
    assert not any(taken)


def test_a_cache_goes_back_and_forth_between_both_ways(models, taken):
    model = models("llama")
    expected = ordinary(model, 20)
    taken.clear()
    for native in (True, False):
        cache, out = DynamicCache(config=model.config), []
        for piece in (5, 1, 3, 6, 1, 4):
            with use_native_step(native):
                out.append(feed(model, piece, cache=cache))
            native = not native
        assert_close(torch.cat(out, dim=1), expected)
    assert taken == [True, False] * 3 + [False, True] * 3


def test_a_cache_that_the_caller_made_without_a_configuration_works(models, taken):
    model = models("llama")
    assert_close(feed(model, 4, 1, cache=DynamicCache()), ordinary(model, 4, 1))
    assert taken[:2] == [True, True]


def test_a_cropped_cache_goes_on_from_there(models):
    model = models("mixtral")
    cache = DynamicCache(config=model.config)
    feed(model, 9, 1, 1, 1, cache=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    assert_close(feed(model, 1, 3, cache=cache), ordinary(model, 12)[:, 8:])


def test_sequences_without_padding_share_steps(models, taken):
    model = models("qwen3")
    ids = torch.stack([PROMPT[0], PROMPT[0].flip(0)])
    pieces = (ids[:, :12], ids[:, 12:13], ids[:, 13:17], ids[:, 17:])
    expected = ordinary(model, *pieces)
    taken.clear()
    assert_close(feed(model, *pieces), expected)
    assert taken == [False, True, True, True]


def test_padded_sequences_are_left_to_transformers(models, taken):
    model = models("llama")
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, :5] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT.expand(2, -1), attention_mask=mask[:, :20], past_key_values=cache, use_cache=True)
        model(PROMPT[:, :1].expand(2, -1), attention_mask=mask, past_key_values=cache, use_cache=True)
    assert taken == [False, False]


def test_contexts_of_several_stretches_equal_transformers_for_any_number_of_threads(models, taken):
    model = models("llama")
    ids = torch.randint(0, 128, (1, 700), generator=torch.Generator().manual_seed(0))
    pieces = (ids[:, :509], ids[:, 509:510], ids[:, 510:515], ids[:, 515:516])
    expected = ordinary(model, *pieces)
    taken.clear()
    found = []
    for threads in (1, 3):
        _native.set_threads(threads)
        try:
            found.append(feed(model, *pieces))
        finally:
            _native.set_threads(0)
    assert torch.equal(*found)
    assert taken == [False, True, True, True] * 2
    assert_close(found[0], expected)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_agree(isa, dtype, models):
    model = models("qwen3 moe", dtype)
    expected = feed(model, 8, 1, 5)
    try:
        with _native.forced_isa(isa):
            found = feed(model, 8, 1, 5)
    except RuntimeError as error:
        pytest.skip(str(error))
    # a last bit of a sum may push keys and values over a rounding edge of their own dtype
    assert_close(
        found, expected, {torch.float32: TOLERANCE, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    )


def change_in_place(model):
    model.model.layers[1].mlp.down_proj.q_weight.bitwise_not_()


def replace_stored(model):
    linear = model.model.layers[0].self_attn.q_proj
    linear.q_scale = linear.q_scale.bitwise_not()


def change_norm(model):
    model.model.layers[0].input_layernorm.weight.data.mul_(2)


def replace_norm(model):
    model.model.norm.weight = torch.nn.Parameter(2 * model.model.norm.weight, requires_grad=False)


def swap_layers(model):
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


@pytest.mark.parametrize("change", [change_in_place, replace_stored, change_norm, replace_norm, swap_layers])
def test_changed_weights_are_noticed(change, llama, taken):
    before = feed(llama, 8)
    assert taken == [True]
    change(llama)
    after = feed(llama, 8)
    assert taken == [True, True]
    assert (after - before).abs().max() > 0.1
    assert_close(after, ordinary(llama, 8))


def dense_linear(model):
    linear = model.model.layers[1].self_attn.v_proj
    dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
    model.model.layers[1].self_attn.v_proj = dense.requires_grad_(False)


def hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def own_forward(model):
    norm = model.model.layers[0].input_layernorm
    plain = norm.forward
    norm.forward = lambda states: 2 * plain(states)


def train(model):
    model.train()


@pytest.mark.parametrize("change", [dense_linear, hook, own_forward, train])
def test_foreign_modules_hooks_and_training_are_left_to_transformers(change, llama, taken):
    feed(llama, 8)
    change(llama)
    found = feed(llama, 8)
    assert taken == [True, False]
    assert torch.equal(found, ordinary(llama, 8))


def test_requests_for_more_outputs_are_left_to_transformers(llama, taken):
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        outputs = llama(PROMPT[:, :4], past_key_values=cache, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    feed(llama, 8)  # the idle recording hooks that stay do not matter
    assert taken == [False, True]
    llama.config.output_hidden_states = True
    feed(llama, 8)
    assert taken == [False, True, False]


def test_router_logits_are_left_to_transformers(models, taken):
    model = models("mixtral")
    with torch.no_grad():
        outputs = model(
            PROMPT[:, :4], past_key_values=DynamicCache(config=model.config), output_router_logits=True
        )
    assert len(outputs.router_logits) == 2
    assert taken == [False]


@pytest.mark.parametrize("other", ["gradients", "exact activations", "positions", "switched off"])
def test_calls_of_another_kind_are_left_to_transformers(other, models, taken):
    model = models("llama")
    cache = DynamicCache(config=model.config)
    options = {"past_key_values": cache, "use_cache": True}
    with torch.set_grad_enabled(other == "gradients"), use_native_step(other != "switched off"):
        if other == "exact activations":
            with use_activations("float"):
                model(PROMPT[:, :4], **options)
        elif other == "positions":
            model(PROMPT[:, :4], position_ids=torch.tensor([[0, 1, 0, 1]]), **options)
        else:
            model(PROMPT[:, :4], **options)
    assert taken == [False]


def test_a_shared_expert_is_left_to_transformers(models, taken):
    model = models(SHARED)
    assert not isinstance(model.base_model.forward, NativeForward)
    with pytest.raises(UnknownPartError):  # also if the family said that its layers are like Llama's
        llama_like.layer_parts(model.base_model)
    assert feed(model, 9, 1).isfinite().all()
    assert taken == []


def test_sliding_windows_are_left_to_transformers(tmp_path, taken):
    model = load_model(build_quantized_folder(small_mistral(4), tmp_path).path)
    assert_close(feed(model, 4, 1, 1), ordinary(model, 6))
    assert not taken


def test_the_environment_switches_native_steps_off(monkeypatch):
    monkeypatch.setattr("dbrx_quant.runtime.step.native_step._enabled", None)
    monkeypatch.setenv("DBRXQ_NATIVE_STEP", "0")
    assert not native_step_enabled()
    monkeypatch.setattr("dbrx_quant.runtime.step.native_step._enabled", None)
    monkeypatch.setenv("DBRXQ_NATIVE_STEP", "perhaps")
    with pytest.raises(ValueError, match="DBRXQ_NATIVE_STEP: 'perhaps', expected 0 or 1"):
        native_step_enabled()


def test_copies_of_a_model_step_on_their_own(llama, taken):
    before = feed(llama, 8)
    copied = copy.deepcopy(llama)
    restored = pickle.loads(pickle.dumps(llama))
    change_norm(llama)
    assert not torch.equal(feed(llama, 8), before)
    assert torch.equal(feed(copied, 8), before)
    assert torch.equal(feed(restored, 8), before)
    assert all(taken)
    assert copied.state_dict().keys() == llama.state_dict().keys()


def test_a_model_that_left_the_cpu_leaves_no_tensors_behind(llama, taken):
    feed(llama, 8)
    stored = [weakref.ref(tensor) for tensor in llama.model.layers[0].mlp.up_proj.stored()]
    llama.to("meta")
    with torch.no_grad():
        llama(PROMPT[:, :8].to("meta"), past_key_values=DynamicCache(config=llama.config))
    gc.collect()
    assert taken == [True, False]
    assert [tensor() for tensor in stored] == [None] * 5


def random_states(tokens, generator):
    return torch.randn(2, 3, tokens, 16, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_a_growing_layer_does_what_a_dynamic_layer_does(seed):
    generator = torch.Generator().manual_seed(seed)
    layers = DynamicLayer(), GrowingLayer()
    for _ in range(40):
        action = int(torch.randint(0, 8, (), generator=generator))
        keys, values = (random_states(int(3**action % 7), generator) for _ in range(2))
        order = torch.randperm(2, generator=generator)
        for layer in layers:
            if action == 7:
                layer.crop(-1 if layer.get_seq_length() > 1 else 0)
            elif action == 6:
                layer.reorder_cache(order)
            elif action == 5:
                layer.batch_select_indices(order)
            elif action == 4 and seed == 4:
                layer.reset()
            else:
                layer.update(keys, values)
        plain, growing = layers
        assert plain.get_seq_length() == growing.get_seq_length()
        assert plain.get_mask_sizes(3) == growing.get_mask_sizes(3)
        if plain.get_seq_length():
            assert torch.equal(plain.keys, growing.keys)
            assert torch.equal(plain.values, growing.values)


def test_a_growing_layer_never_writes_into_tensors_that_were_given_to_it():
    generator = torch.Generator().manual_seed(0)
    layer, given = GrowingLayer(), random_states(6, generator)
    layer.update(given, given)
    layer.keys, layer.values = given, given
    before = given.clone()
    layer.crop(-3)
    layer.update(*(random_states(2, generator) for _ in range(2)))
    assert torch.equal(given, before)
