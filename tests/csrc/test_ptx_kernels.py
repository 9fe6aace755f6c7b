"""The CUDA kernels as nvcc makes them: their PTX, run by an interpreter, launched by the real host code.

A second proof beside csrc/emulator, with which it shares nothing: instructions, fragment layouts and shared
memory are those of the manual. No GPU is needed, only nvcc; what ptxas and the hardware do after that,
nobody has seen here.
"""

from math import prod

import pytest
import torch
from emulated import FLOATS, SHAPES, dequantize, linear
from ptx_cases import (
    EVERY_WIDTH,
    TARGETS,
    WIDTHS,
    check_experts,
    check_linear,
    names,
    random_experts,
    shared_device,
)

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.kernels.stored import Stored

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=TARGETS, ids=lambda target: f"sm_{target}")
def device(request):
    found = shared_device(request.param)
    found.machine.seed(0)
    return found


def some(default, *values):
    """Values of a parameter, of which all but the first `default` are slow."""
    slow = [value if isinstance(value, tuple) else (value,) for value in values[default:]]
    return (*values[:default], *(pytest.param(*value, marks=pytest.mark.slow) for value in slow))


# ---- Weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", some(3, "every width", "a 2-bit tail of 16 rows", "a tail alone", *SHAPES))
def test_weights_are_exact(device, shape):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n, scale=0.5)
    with device.running():
        whole, part = dequantize(tensors), dequantize(tensors, n - 13)
    weight = oracle.dequantize(tensors)
    assert oracle.first_difference(whole, weight) is None
    assert oracle.first_difference(part, weight[:, : n - 13].contiguous()) is None


@pytest.mark.parametrize("scale", some(0, 2e-5, 60000))
def test_subnormal_and_overflowing_scales_are_exact_too(device, scale):
    tensors = oracle.random_tensors([(bits, 32) for bits in WIDTHS], 32)
    tensors["q_scale_max"] = torch.full((6,), scale, dtype=torch.float16)
    with device.running():
        ours = dequantize(tensors)
    weight = oracle.dequantize(tensors)
    assert torch.equal(ours.isnan(), weight.isnan())
    assert oracle.first_difference(ours[~weight.isnan()], weight[~weight.isnan()]) is None


def test_words_come_back_from_the_device_layout(device):
    tensors = oracle.random_tensors(EVERY_WIDTH, 160)
    since = len(device.launches)
    with device.running():
        tiled = cuda_tiles.tile(Stored.of(tensors))
        back = cuda_tiles.untile(Stored.of({**tensors, "q_weight": tiled}))
    assert oracle.first_difference(back, tensors["q_weight"]) is None
    assert names(device, since) == ["repack_kernel", "unpack_kernel"]


# ---- Products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(1, *FLOATS), ids=str)
@pytest.mark.parametrize("tokens", some(3, 1, 9, 17, 8, 16, 65))
def test_linear_is_as_accurate_as_torch(device, tokens, dtype):
    tensors = oracle.random_tensors(EVERY_WIDTH, 160, bias=True)
    check_linear(device, tensors, torch.randn(tokens, 304).to(dtype), 150)


@pytest.mark.parametrize("bits", some(0, *WIDTHS))
def test_products_multiply_the_exact_weights_at_every_width(device, bits):
    tensors = oracle.random_tensors([(bits, 32), (bits, 64)], 64, seed=bits, scale=0.5)
    for tokens in (1, 9, 48):
        with device.running():
            rows = [linear(part, tensors) for part in torch.eye(96, dtype=torch.float16).split(tokens)[:2]]
        ours = torch.cat(rows)
        assert oracle.first_difference(ours, oracle.dequantize(tensors)[: len(ours)].contiguous()) is None


@pytest.mark.parametrize("tokens", some(2, 1, 20, 12))
@pytest.mark.parametrize("multiprocessors", some(1, 3, 132))
def test_linear_is_right_when_blocks_share_its_input_channels(device, tokens, multiprocessors):
    tensors = oracle.random_tensors([(6, 32), (4, 480), (3, 512), (2, 528)], 64, bias=True)
    since = len(device.launches)
    check_linear(device, tensors, torch.randn(tokens, 1552).half(), multiprocessors=multiprocessors)
    assert prod(device.launches[-1].grid) > 1, names(device, since)  # for one tile of columns


@pytest.mark.parametrize("tokens", some(1, 2, 20))
def test_no_order_of_blocks_changes_a_bit(device, tokens, monkeypatch):
    tensors = oracle.random_tensors([(4, 256), (2, 272)], 96)
    x, results = torch.randn(tokens, 528).half(), []
    for seed, lanes in ((1, 128), (2, 256), (3, 8192)):  # one block, two, all at a time
        device.machine.seed(seed)
        monkeypatch.setattr(device.machine, "together", lanes)
        results.append(check_linear(device, tensors, x))
    assert all(torch.equal(other, results[0]) for other in results[1:])


# ---- Experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    some(
        3,
        (1, torch.float16),
        (3, torch.float32),
        (40, torch.float16),
        (5, torch.bfloat16),
        (1, torch.float32),
        (40, torch.float32),
    ),
    ids=str,
)
def test_experts_are_as_accurate_as_torch(device, tokens, dtype):
    index = torch.randint(0, 5, (tokens, 2))  # 4 is no expert
    check_experts(
        device, random_experts(4, 128, 160), torch.randn(tokens, 128).to(dtype), index, torch.rand(tokens, 2)
    )


@pytest.mark.parametrize("activation", some(0, "gelu", "gelu_tanh", "relu"))
def test_every_activation_agrees_with_its_formula(device, activation):
    x, index = torch.randn(5, 96) * 3, torch.randint(0, 2, (5, 2))
    check_experts(device, random_experts(2, 96, 64), x, index, torch.rand(5, 2), activation)


def test_gate_and_up_of_16_rows_are_made_together(device):
    index, since = torch.randint(0, 2, (12, 1)), len(device.launches)
    check_experts(device, random_experts(2, 96, 160), torch.randn(12, 96).half(), index, torch.rand(12, 1))
    assert any("gemv" in name and "2, 2" in name for name in names(device, since)), names(device, since)


@pytest.mark.parametrize("tokens", some(0, 1, 20))
def test_experts_whose_input_channels_are_split_over_blocks(device, tokens):
    index = torch.randint(0, 2, (tokens, 1))
    x = torch.randn(tokens, 576).half()
    check_experts(device, random_experts(2, 576, 544), x, index, torch.rand(tokens, 1), multiprocessors=132)


# ---- DBRX's own lengths of sums, a few columns of each --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
@pytest.mark.parametrize("k", [6144, 10752])
def test_slices_of_dbrx_are_as_accurate_as_torch(device, k, tokens):
    groups = (
        [(4, 128)] * (k // 1024) + [(3, 128)] * (k // 256) + [(2, 128)] * (k // 128 - k // 256 - k // 1024)
    )
    tensors = oracle.random_tensors(groups, 160)
    check_linear(device, tensors, torch.randn(tokens, k).half(), multiprocessors=132)


@pytest.mark.slow
def test_experts_with_the_hidden_size_of_dbrx_are_as_accurate_as_torch(device):
    index = torch.tensor([[0, 1]])
    x = torch.randn(1, 6144).half()
    check_experts(device, random_experts(2, 6144, 128), x, index, torch.rand(1, 2), multiprocessors=132)
