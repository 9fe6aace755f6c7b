"""Whatever is changed in a loaded model: native steps give what transformers gives, or are not taken."""

import copy

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.llama import modeling_llama

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.families.parts import ADOPTED
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.step.native_step import NativeForward, use_native_step
from dbrx_quant.runtime.step.snapshot import attributes

PROMPT = torch.arange(6)[None] * 7 % 128
TOLERANCE = 5e-3  # of the logits' deviation


@pytest.fixture(autouse=True)
def rounded_activations(one_thread):
    with use_activations("int16"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(name):
        if name not in made:
            folder = build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model"))
            made[name] = load_model(folder.path)
        return copy.deepcopy(made[name])

    return model


@pytest.fixture
def llama(models):
    """A model that a test may change, and that has made a step."""
    model = models("llama")
    assert is_native(model)
    return model


@torch.no_grad()
def logits(model, native):
    """The logits of one step, and whether it was a native one."""
    calls, step = [], NativeForward._step

    def watched(self, **arguments):
        states = step(self, **arguments)
        calls.append(states is not None)
        return states

    NativeForward._step = watched
    try:
        with use_native_step(native):
            cache = DynamicCache(config=model.config)
            return model(PROMPT, past_key_values=cache, use_cache=True).logits.float(), calls == [True]
    finally:
        NativeForward._step = step


def is_native(model):
    return logits(model, True)[1]


def outcome(model, native):
    """As `logits`; None where the model does not run at all."""
    try:
        return logits(model, native)
    except Exception:
        return None, False


def check(model, what, tolerance=TOLERANCE):
    """Raise unless native steps, if taken, are what transformers computes; returns whether one is taken."""
    found, native = outcome(model, True)
    if native or found is None:
        expected, _ = outcome(model, False)
        assert (found is None) == (expected is None), what
        if expected is not None:
            error = (found - expected).abs().max() / expected.std()
            assert error < tolerance, f"{what}: {error.item()}"
    return native


def others(value):
    """Values that an attribute might be set to in place of this one."""
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, int):
        return [max(1, value - 1), 0]
    if isinstance(value, float):
        return [2 * value + 0.3, 0.0]
    return ["gelu"] if isinstance(value, str) else [None]


@pytest.mark.parametrize("name", ["dbrx", "llama", "qwen3 moe"])
def test_every_attribute_of_every_module(name, models):
    model = models(name)
    decoder, seen = model.base_model, set()
    assert check(model, "unchanged")
    for path, before in attributes(decoder).items():
        owner, _, attribute = path.rpartition(".")
        module = decoder.get_submodule(owner)
        kind = (type(module), attribute)
        if kind in seen:
            continue
        seen.add(kind)
        for value in others(before):
            setattr(module, attribute, value)
            check(model, f"{path} = {value!r}")
        delattr(module, attribute)
        check(model, f"no {path}")
        setattr(module, attribute, before)
    assert check(model, "as it was")


@pytest.mark.parametrize("name", ["dbrx", "llama"])
def test_every_value_of_the_configuration(name, models):
    model = models(name)
    waiting = [model.config]
    while waiting:
        config = waiting.pop()
        values = config if isinstance(config, dict) else vars(config)
        for key, before in list(values.items()):
            if isinstance(before, (dict, PreTrainedConfig)):
                waiting.append(before)
            for value in others(before):
                values[key] = value
                check(model, f"{key} = {value!r}")
            values[key] = before
    assert check(model, "as it was")


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("dbrx", "top_k", 1),
        ("dbrx", "clip_qkv", 0.25),
        ("dbrx", "moe_normalize_expert_weights", 2.0),
        ("dbrx", "eps", 0.5),
        ("qwen3 moe", "top_k", 1),
        ("qwen3 moe", "norm_topk_prob", True),
        ("qwen3 moe", "variance_epsilon", 0.5),
        ("llama", "scaling", 0.05),
        ("llama", "attention_scaling", 2.0),
    ],
)
def test_steps_stay_native_where_it_is_known_what_an_attribute_does(name, attribute, value, models):
    model = models(name)
    before = logits(model, True)[0]
    assert attribute in ADOPTED
    for module in model.base_model.modules():
        if hasattr(module, attribute):
            setattr(module, attribute, value)
    assert check(model, attribute)
    assert not torch.allclose(logits(model, True)[0], before, atol=1e-3)


def other_memory(model):
    weight = model.model.layers[1].input_layernorm.weight
    weight.data = 2 * weight.data


def other_frequencies(model):
    model.model.rotary_emb.inv_freq.data = 0.5 * model.model.rotary_emb.inv_freq.data


def frequencies_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def frequencies_of_inference(model):
    with torch.inference_mode():
        model.model.norm.weight = torch.nn.Parameter(torch.ones(64), requires_grad=False)
    logits(model, True)
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_norm(model):
    model.model.norm = modeling_llama.LlamaRMSNorm(64, eps=0.5)


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


def other_dtype(model):
    model.to(torch.bfloat16)


def fewer_layers(model):
    model.config.num_hidden_layers = 1


def dropped_layer(model):
    del model.model.layers[0]


def dropout(model):
    model.model.layers[0].self_attn.attention_dropout = 0.99
    model.model.layers[0].self_attn.train()


def layer_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def layer_pre_hook(model):
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def adapter(model):
    class Low(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.a(x)

    attention = model.model.layers[0].self_attn
    attention.q_proj = Low(attention.q_proj)


def other_class(model):
    class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, states):
            return 2 * super().forward(states)

    model.model.norm.__class__ = LlamaRMSNorm


def own_forward(model):
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda states: 2 * plain(states)


@pytest.mark.parametrize(
    "change",
    [
        other_memory,
        other_frequencies,
        frequencies_in_place,
        frequencies_of_inference,
        other_norm,
        other_activation,
        other_dtype,
        fewer_layers,
        dropped_layer,
        layer_hook,
        layer_pre_hook,
        adapter,
        other_class,
        own_forward,
    ],
)
def test_changes_of_other_kinds_are_noticed(change, llama):
    before = logits(llama, True)[0]
    change(llama)
    check(llama, change.__name__, 0.1 if change is other_dtype else TOLERANCE)
    assert not torch.allclose(logits(llama, True)[0], before, atol=1e-3)


def test_a_layer_in_training_is_left_to_transformers(llama):
    dropout(llama)
    assert not is_native(llama)
    llama.eval()
    assert not is_native(llama)  # the dropout itself was changed, too
    llama.model.layers[0].self_attn.attention_dropout = 0.0
    assert is_native(llama)


def test_code_of_others_in_transformers_classes_is_left_to_transformers(llama, monkeypatch):
    plain = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, states: 2 * plain(self, states))
    assert not is_native(llama)
    monkeypatch.undo()
    assert is_native(llama)


def test_values_that_no_layer_reads_change_nothing(llama):
    llama.config.pad_token_id = 3
    llama.config.num_experts_per_tok = 7
    assert check(llama, "token ids")
