"""Native steps on a GPU, which the emulator plays: what transformers' own code and the CPU's steps give."""

import pytest
import torch
from emulated import launches, play_gpu
from quant_models import CONFIGS, build_quantized_folder
from transformers import DynamicCache

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.step.gpu_step import GpuStep
from dbrx_quant.runtime.step.native_step import NativeForward, use_native_step

FAMILIES = ("dbrx", "llama", "mixtral", "qwen3 moe")
PROMPT = torch.arange(20)[None] * 7 % 128
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the logits' deviation


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = build_quantized_folder(CONFIGS[name](), tmp_path_factory.mktemp("model"))
        return made[name].path

    return folder


@pytest.fixture
def on_gpu(emulated, monkeypatch, folders):
    """Loads a model to the GPU."""
    play_gpu(monkeypatch)
    return lambda name, dtype=torch.float32: load_model(folders(name), dtype=dtype)


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of a decoder was a native step, call after call."""
    calls, step = [], NativeForward._step

    def watched(self, **arguments):
        states = step(self, **arguments)
        assert states is None or isinstance(self._form.step, GpuStep)
        calls.append(states is not None)
        return states

    monkeypatch.setattr(NativeForward, "_step", watched)
    return calls


@torch.no_grad()
def feed(model, *pieces, native=True, cache=None):
    """The logits of all tokens, fed piece by piece with a cache; a piece is a number of tokens, or ids."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, at = [], cache.get_seq_length()
    with use_native_step(native):
        for piece in pieces:
            ids = PROMPT[:, at : at + piece] if isinstance(piece, int) else piece
            out.append(model(ids, past_key_values=cache, use_cache=True).logits.float())
            at += ids.shape[1]
    return torch.cat(out, dim=1)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.std()
    assert error < tolerance, error.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_equal_those_of_transformers(name, on_gpu, taken):
    model = on_gpu(name)
    expected = feed(model, 9, 1, 1, 1, 4, native=False)
    taken.clear()
    found = feed(model, 9, 1, 1, 1, 4)
    assert taken == [False, True, True, True, True]
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("name", "most"), [("llama", 5), ("dbrx", 5)])
def test_a_layer_takes_five_launches(name, most, on_gpu, emulated):
    model = on_gpu(name, torch.float16)
    cache = DynamicCache(config=model.config)
    feed(model, 9, 1, cache=cache)
    launches(emulated)
    with torch.no_grad():
        model.base_model(
            input_ids=PROMPT[:, 10:11], past_key_values=cache, use_cache=True
        )  # the second: captured
    found = launches(emulated)
    layer = ["FewLinears", "Attention", "FewLinears", "FewGateUp", "FewDown"]
    assert found == ["Embed", *layer * model.config.num_hidden_layers, "Normalise"]
    assert len(layer) <= most
