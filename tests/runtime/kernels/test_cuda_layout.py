"""The layout of the CUDA kernels on the emulator: there and back, one copy of the weights in a model, never
mistaken for the file's.
"""

import copy
import pickle

import pytest
import torch
from emulated import SANITIZED, SHAPES, dequantize, linear, play_gpu
from quant_models import CONFIGS, build_quantized_folder
from safetensors.torch import load_file

import oracles_ops as oracle
from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.kernels import cuda, cuda_tiles, ops
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _cuda
from dbrx_quant.runtime.model.linear import QuantLinear

pytestmark = pytest.mark.usefixtures("emulated")


def test_the_device_layout_is_made_once_and_follows_modifications():
    tensors = oracle.random_tensors([(4, 64)], 64)
    first = cuda.device_linear(Stored.of(tensors))
    assert cuda.device_linear(Stored.of(tensors)) is first
    tensors["q_weight"].bitwise_not_()
    assert oracle.first_difference(dequantize(tensors), oracle.dequantize(tensors)) is None
    tensors["q_scale"] = tensors["q_scale"].bitwise_not()  # another tensor beside the same q_weight
    assert oracle.first_difference(dequantize(tensors), oracle.dequantize(tensors)) is None


def test_the_device_layout_lives_as_long_as_the_words_of_the_file():
    tensors = oracle.random_tensors([(4, 64)], 64)
    dequantize(tensors)
    before = len(cuda_tiles._linears)
    del tensors["q_weight"]
    assert len(cuda_tiles._linears) == before - 1


def test_broken_tables_are_refused():
    tensors = oracle.random_tensors([(4, 32), (3, 32)], 32)
    tensors["q_groups"][2] = 7
    with pytest.raises(ValueError, match="q_groups"):
        dequantize(tensors)
    tensors = oracle.random_tensors([(4, 64)], 32)
    tensors["q_invperm"][0] = tensors["q_invperm"][1]
    with pytest.raises(ValueError, match="q_invperm"):
        dequantize(tensors)


# ---- There and back ---------------------------------------------------------------------------------------


def tiled(tensors):
    """The tensors with a tiled q_weight."""
    return {**tensors, "q_weight": cuda_tiles.tile(Stored.of(tensors))}


def untiled(tensors):
    return cuda_tiles.untile(Stored.of(tensors))


@pytest.mark.parametrize("shape", SHAPES)
def test_untiling_gives_the_files_words_bit_for_bit(shape):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n)
    words = tiled(tensors)
    assert oracle.first_difference(untiled(words), tensors["q_weight"]) is None
    assert oracle.first_difference(dequantize(words, n), oracle.dequantize(tensors)) is None


@pytest.mark.parametrize("n", [32, 64, 96, 128, 160])
def test_tiled_words_take_what_the_files_take(n):
    for bits in (8, 6, 5, 4, 3, 2):
        tensors = oracle.random_tensors([(bits, 64)], n)
        assert tiled(tensors)["q_weight"].nbytes == tensors["q_weight"].nbytes
    tail = oracle.random_tensors([(4, 32), (2, 48)], n)
    assert tiled(tail)["q_weight"].nbytes == tail["q_weight"].nbytes + 4 * n  # a word row


def test_tiled_words_are_refused_where_the_kernels_do_not_run():
    tensors = tiled(oracle.random_tensors([(4, 64)], 64))
    with pytest.raises(
        ValueError, match=r"q_weight: \(8, 16, 4\) is the layout of the CUDA kernels, but on cpu"
    ):
        ops.linear(torch.ones(1, 64), tensors)


def test_tiled_words_without_the_library_are_an_error(monkeypatch):
    tensors = tiled(oracle.random_tensors([(4, 64)], 64))
    monkeypatch.setattr(_cuda, "why_unavailable", lambda device: "not built")
    with pytest.raises(RuntimeError, match="which are missing: not built"):
        linear(torch.ones(1, 64), tensors, 64)


# ---- Modules, with the CPU in the part of the GPU ---------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    play_gpu(monkeypatch)


def quant_linear(bias=True):
    tensors = oracle.random_tensors([(5, 32), (3, 64), (2, 48)], 96, bias=bias)
    return tensors, QuantLinear.from_tensors({name: t.clone() for name, t in tensors.items()}, 90)


def assert_equal_tensors(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert oracle.first_difference(ours[name], tensor) is None, name


def test_a_layer_on_a_gpu_holds_its_words_once_and_shows_the_files(gpu):
    tensors, layer = quant_linear()
    layer.to("cpu")
    assert layer.stored().tiled
    x, before = torch.randn(3, 144).half(), set(cuda_tiles._linears)
    assert torch.allclose(layer(x).double(), oracle.linear(x, tensors, 96)[:, :90], rtol=2e-3, atol=2e-3)
    made = [linear for key, (_, linear) in cuda_tiles._linears.items() if key not in before]
    assert len(made) == 1
    held = [t for linear in made for t in linear.made]
    assert all(t.numel() < layer.q_weight.numel() for t in held), "a second copy of the words"
    assert_equal_tensors(layer.state_dict(), tensors)
    assert_equal_tensors(layer.tensors(), tensors)
    assert layer.stored().tiled


def test_a_layer_that_leaves_the_gpu_has_the_files_words(gpu, monkeypatch):
    tensors, layer = quant_linear()
    layer.to(torch.bfloat16)
    assert layer.stored().tiled
    monkeypatch.setattr(cuda_tiles, "on_gpu", lambda tensor: False)
    layer.to("cpu")
    assert_equal_tensors(dict(layer.named_buffers()), tensors)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_a_gpu_loads_the_files_tensors(gpu, assign):
    tensors, layer = quant_linear()
    layer.to("cpu")
    x = torch.randn(3, 144).half()
    layer(x)
    other = oracle.random_tensors([(6, 32), (2, 96)], 96, seed=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(other, strict=False)
    assert_equal_tensors(layer.state_dict(), tensors)
    other = {**tensors, "q_weight": ~tensors["q_weight"]}
    layer.load_state_dict(other, assign=assign)
    assert layer.stored().tiled
    assert torch.allclose(layer(x).double(), oracle.linear(x, other, 96)[:, :90], rtol=2e-3, atol=2e-3)


def test_copies_of_a_layer_stay_in_their_layout(gpu):
    tensors, layer = quant_linear()
    layer.to("cpu")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal_tensors(other.state_dict(), tensors)


def test_a_layer_waiting_for_its_tensors_is_not_tiled(gpu):
    layer = QuantLinear(96, 72, word_rows=11, groups=2, device="meta").to_empty(device="cpu")
    assert not layer.stored().tiled


def test_a_model_on_a_gpu_is_tiled_when_loaded_and_saved_as_it_was(gpu, tmp_path):
    if SANITIZED:
        pytest.skip("the sanitizers have seen these kernels")
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "dbrx")
    model = load_model(folder.path)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert all(layer.stored().tiled for layer in layers)
    ids = torch.arange(6)[None] * 7 % 128
    ours, wanted = model(ids).logits, folder.twin()(ids).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert_equal_tensors(load_file(tmp_path / "again" / "model.safetensors"), folder.tensors)
    assert all(layer.stored().tiled for layer in layers)
