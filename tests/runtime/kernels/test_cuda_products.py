"""The CUDA kernels of linears, compiled for the host by csrc/emulator, through the real backend.

Exact weights, products against fp64, every width and ragged shape, schedules.
"""

import ctypes

import pytest
import torch
from emulated import (
    FLOATS,
    SANITIZED,
    SHAPES,
    TOKENS,
    WIDTHS,
    assert_as_accurate_as_torch,
    dequantize,
    linear,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from safetensors.torch import load_file

import oracles_ops as oracle

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_gives_the_exact_weights(shape):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n, scale=0.5)
    weight = oracle.dequantize(tensors)
    assert oracle.first_difference(dequantize(tensors), weight) is None
    assert oracle.first_difference(dequantize(tensors, n - 13), weight[:, : n - 13].contiguous()) is None


@pytest.mark.parametrize("scale", [2e-5, 60000])
def test_subnormal_and_overflowing_scales_are_exact_too(scale):
    tensors = oracle.random_tensors([(bits, 32) for bits in WIDTHS], 32)
    tensors["q_scale_max"] = torch.full((6,), scale, dtype=torch.float16)
    ours, weight = dequantize(tensors), oracle.dequantize(tensors)
    assert torch.equal(ours.isnan(), weight.isnan())
    assert oracle.first_difference(ours[~weight.isnan()], weight[~weight.isnan()]) is None


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_products_multiply_the_exact_weights_at_every_width(bits, tokens):
    tensors = oracle.random_tensors([(bits, 32), (bits, 64)], 64, seed=bits, scale=0.5)
    rows = [linear(part, tensors) for part in torch.eye(96, dtype=torch.float16).split(tokens)]
    assert oracle.first_difference(torch.cat(rows), oracle.dequantize(tensors)) is None


SOME_GOLDEN = (
    "mix_all_widths_256x96",
    "edge_2bit_tail16_272x64",
    "edge_tinyscale_192x64",
    "edge_packpad_160x72",
)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in SOME_GOLDEN else pytest.mark.slow) for p in GOLDEN]
    or [pytest.param(None, marks=pytest.mark.skip(reason="no golden vectors: ../shared/golden is absent"))],
    ids=lambda path: path.stem if path else "absent",
)
def test_reconstruction_equals_the_golden_files_bit_for_bit(path):
    tensors = load_file(path)
    assert oracle.first_difference(dequantize(tensors), tensors["dequant"]) is None


@settings(max_examples=20 if not SANITIZED else 5, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(1, 3)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from((32, 64, 160)),
    st.integers(1, 20),
    st.integers(0, 2**16),
)
def test_any_legal_group_map_is_exact_and_multiplies(units, tail, n, tokens, seed):
    groups = sorted(((bits, 32 * count) for bits, count in units), key=lambda g: -g[0])
    if tail and groups[-1][0] == 2:
        groups[-1] = (2, groups[-1][1] + 16)
    tensors = oracle.random_tensors(groups, n, seed)
    assert oracle.first_difference(dequantize(tensors), oracle.dequantize(tensors)) is None
    k, out_features = sum(rows for _, rows in groups), n - seed % 32
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    exact = oracle.linear(x, tensors, out_features)
    ours = linear(x, tensors, out_features).double()
    assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


# ---- Products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_as_accurate_as_torch(shape, dtype):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n, bias=True)
    k = sum(rows for _, rows in groups)
    ours, exact, plain = [], [], []
    for tokens in TOKENS if not SANITIZED else (1, 9, 65):
        x = torch.randn(tokens, k).to(dtype)
        ours.append(linear(x, tensors))
        exact.append(oracle.linear(x, tensors, n))
        plain.append(oracle.linear(x, tensors, n, torch.float32).to(dtype))
    if dtype == torch.float32:  # 22 bits of x a product, not 24: an error of 2^-23 for every term
        x = torch.cat([torch.ones(1, k), torch.randn(8, k)]) / 3
        bound = 2**-21 * (x.abs().double() @ oracle.dequantize(tensors).double().abs()) + 1e-6
        assert ((linear(x, tensors).double() - oracle.linear(x, tensors, n)).abs() <= bound).all()
    else:
        assert_as_accurate_as_torch(torch.cat(ours), torch.cat(exact), torch.cat(plain))


def test_bfloat16_activations_beyond_the_range_of_a_half_are_scaled():
    tensors = oracle.random_tensors([(4, 64)], 32)
    x = torch.randn(4, 64) * torch.tensor([1e30, 1e-30, 1e5, 0.0])[:, None]
    x[2, 5] = -3e8  # an outlier, as trained models have them
    x = x.bfloat16()
    exact = oracle.linear(x, tensors, 32)
    for t in range(4):
        plain = oracle.linear(x[t : t + 1], tensors, 32, torch.float32).bfloat16()
        assert_as_accurate_as_torch(linear(x, tensors)[t : t + 1], exact[t : t + 1], plain, f"token {t}")


def test_an_fp16_prompt_of_512_rows_meets_the_reconstructed_weights_in_torch():
    tensors = oracle.random_tensors([(4, 64), (2, 32)], 64, bias=True)
    x = torch.randn(2, 256, 96).half()
    assert torch.equal(linear(x, tensors, 50), x @ oracle.dequantize(tensors)[:, :50] + tensors["bias"][:50])
    exact = oracle.linear(x[1], tensors, 64)
    assert torch.allclose(linear(x[1], tensors).double(), exact, rtol=1e-2, atol=1e-2)


def test_infinite_and_nan_activations_stay_so():
    tensors = oracle.random_tensors([(4, 64)], 32)
    for dtype in FLOATS:
        x = torch.zeros(3, 64)
        x[0, 1], x[1, 2] = float("inf"), float("nan")
        y = linear(x.to(dtype), tensors)
        assert not y[0].isfinite().any()
        assert y[1].isnan().all()
        assert (y[2] == 0).all()


def test_a_token_has_the_same_bits_in_any_batch_of_its_kernel():
    tensors = oracle.random_tensors([(5, 64), (3, 96)], 96, bias=True)
    x = torch.randn(70, 160).half()
    for least, most in ((1, 8), (9, 16), (17, 70)):
        whole = linear(x[:most], tensors)
        assert torch.equal(linear(x[:least], tensors), whole[:least])


def test_schedules_and_repetitions_change_no_bit(emulated):
    tensors = oracle.random_tensors([(6, 64), (4, 512), (2, 528)], 160, bias=True)
    for tokens in (2, 12, 40):
        x = torch.randn(tokens, 1104).half()
        results = []
        for seed in range(6):
            emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
            results.append(linear(x, tensors))
        assert all(torch.equal(other, results[0]) for other in results[1:]), f"{tokens} tokens"


def test_linear_of_no_tokens_is_empty_and_leading_dimensions_are_kept():
    tensors = oracle.random_tensors([(4, 64)], 32)
    assert linear(torch.zeros(0, 64), tensors).shape == (0, 32)
    x = torch.randn(2, 3, 64)
    assert torch.equal(linear(x, tensors).view(6, 32), linear(x.view(6, 64), tensors))
