"""The integer kernels over repacked linears: against fp64 oracles, on every instruction set."""

import ctypes
import gc
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import ops
from dbrx_quant.runtime.kernels import repacked as cache
from dbrx_quant.runtime.kernels.activations import activations, set_activations, use_activations
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.kernels.structs import describe_linear
from dbrx_quant.runtime.library import _native

WIDTHS = (8, 6, 5, 4, 3, 2)
SHAPES = {
    "one unit": ([(4, 32)], 32),
    "a tail of 16 rows alone": ([(2, 16)], 32),
    "every width": ([(8, 32), (6, 32), (5, 64), (4, 96), (3, 64), (2, 32)], 160),
    "groups longer than a segment": ([(5, 160), (4, 288), (3, 416), (2, 144)], 96),
    "groups of one unit": ([(8, 32), (3, 32), (3, 32), (2, 32), (2, 32), (2, 16)], 64),
}
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 33)

# Weights are code * scale, without the rounding to half: at most 2^-11 of a weight. Activations: half a step,
# the largest of a segment over 127 steps, or the largest of a token over 16256.
HALF_ROUNDING = 2.0**-11
STEPS = {"int8": 127, "int16": 16256}
EIGHT_BITS = 0.005  # rounding error of 8-bit weights over the weights, rms


@pytest.fixture(params=["int8", "int16"])
def mode(request):
    with use_activations(request.param):
        yield request.param


def bound(x, tensors, mode, out_features):
    """The largest error [T, N] that the rounding of activations and weights allows."""
    weight = oracle.dequantize(tensors)[:, :out_features].double().abs()
    packed = torch.argsort(tensors["q_invperm"].long())
    _, widths, group = oracle.unpack(tensors)
    step = torch.zeros_like(x, dtype=torch.float64)
    for g in sorted(set(group.tolist())):
        rows = (group == g).nonzero()[0]
        one_byte = mode == "int8" and widths[rows[0]] <= 4
        for start in range(0, len(rows), 128):
            channels = packed[torch.from_numpy(rows[start : start + 128])]
            largest = (x[:, channels] if one_byte else x).abs().amax(1, keepdim=True).double()
            step[:, channels] = largest / STEPS["int8" if one_byte else "int16"]
    absolute = x.double().abs()
    return (step / 2 * 1.01 + absolute * HALF_ROUNDING + absolute * 1e-6) @ weight + 1e-9


def assert_within_bound(ours, x, tensors, mode, out_features, what=""):
    exact = oracle.linear(x, tensors, out_features)
    excess = (ours.double() - exact).abs() - bound(x, tensors, mode, out_features) - 1e-6 * exact.abs()
    assert excess.max() <= 0, (
        f"{what}: {excess.max()} beyond the bound at {divmod(int(excess.argmax()), out_features)}"
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_stays_within_the_rounding_of_activations_and_weights(shape, bias, isa, mode):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n, bias=bias)
    k = sum(rows for _, rows in groups)
    generator = torch.Generator().manual_seed(1)
    for tokens in TOKENS:
        x = torch.randn(tokens, k, generator=generator) * torch.rand(k, generator=generator) * 3
        assert_within_bound(ops.linear(x, tensors), x, tensors, mode, n, f"{tokens} tokens")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 6, 8])
def test_one_hot_activations_give_every_code_and_scale(bits, tokens, isa, mode):
    tensors = oracle.random_tensors([(bits, 96)], 64, seed=bits, scale=0.5)
    wanted = oracle.dequantize(tensors).double()
    rows = torch.cat([ops.linear(part, tensors) for part in torch.eye(96).split(tokens)]).double()
    assert torch.allclose(rows, wanted, rtol=2 * HALF_ROUNDING, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(1, 6)), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 128),
    st.sampled_from(("int8", "int16")),
    st.integers(0, 2**16),
)
def test_any_legal_group_map_stays_within_the_bound(units, tail, tokens, out_features, mode, seed):
    groups = sorted(((bits, 32 * count) for bits, count in units), key=lambda group: -group[0])
    if tail and groups[-1][0] == 2:
        groups[-1] = (2, groups[-1][1] - 16)
    tensors = oracle.random_tensors(groups, -(-out_features // 32) * 32, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, sum(rows for _, rows in groups), generator=generator)
    with use_activations(mode):
        for name in oracle.ISAS:
            try:
                with _native.forced_isa(name):
                    ours = ops.linear(x, tensors, out_features)
            except RuntimeError:
                continue  # this machine lacks it; the fixture `isa` reports that
            assert_within_bound(ours, x, tensors, mode, out_features, name)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_byte_costs_less_than_a_tenth_of_the_rounding_of_the_weights(bits):
    # Random weights rounded to a grid of this width with the best of 16 scales a column.
    generator = torch.Generator().manual_seed(bits)
    dense, x = torch.randn(512, 64, generator=generator), torch.randn(64, 512, generator=generator)
    tensors = oracle.random_tensors([(bits, 128)] * 4, 64, seed=bits)
    largest, top = dense.abs().amax(), 2 ** (bits - 1)
    best = torch.full((64,), torch.inf)
    rounded = torch.zeros_like(dense)
    for share in torch.linspace(0.2, 1, 16):
        scale = largest * share / top
        trial = (dense / scale).round().clamp(-top, top - 1) * scale
        error = (trial - dense).square().sum(0)
        rounded = torch.where(error < best, trial, rounded)
        best = torch.minimum(best, error)
    weights_rounded = oracle.rms(x @ rounded - x @ dense) / oracle.rms(x @ dense)
    with use_activations("int8"):
        ours = ops.linear(x, tensors)
    exact = oracle.linear(x, tensors, 64)
    activations_rounded = oracle.rms(ours.double() - exact) / oracle.rms(exact)
    assert activations_rounded < weights_rounded / 10


@pytest.mark.parametrize("outlier", [10.0, 1000.0, 1e5])
def test_two_bytes_lose_less_to_one_huge_activation_than_8_bits_of_weight_do(outlier):
    tensors = oracle.random_tensors([(8, 4096)], 64, seed=3)
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(4))
    x[:, 77] = outlier
    exact = oracle.linear(x, tensors, 64)
    with use_activations("int16"):
        error = ops.linear(x, tensors).double() - exact
    assert error.norm() < 0.3 * EIGHT_BITS * exact.norm()


def test_linear_trims_padded_columns(mode):
    tensors = oracle.random_tensors([(4, 64), (3, 32)], 96, bias=True)
    for tokens in (1, 20):
        x = torch.randn(tokens, 96)
        full = ops.linear(x, tensors)
        for width in (1, 31, 72, 95):
            assert torch.equal(ops.linear(x, tensors, width), full[:, :width])


def test_the_number_of_threads_changes_no_bit(isa, mode):
    tensors = oracle.random_tensors([(6, 32), (4, 64), (2, 48)], 1248, bias=True)
    x, results = torch.randn(37, 144), []
    for threads in (1, 2, 3, 7):
        _native.set_threads(threads)
        results.append([ops.linear(x[:tokens], tensors) for tokens in (1, 5, 37)])
    _native.set_threads(0)
    for other in results[1:]:
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(other, results[0], strict=True))


def test_instruction_sets_with_fused_products_give_the_same_bits(mode):
    tensors = oracle.random_tensors([(8, 32), (5, 64), (3, 256), (2, 48)], 160)
    results = []
    for name in ("avx2", "avxvnni", "avx512"):
        try:
            with _native.forced_isa(name):
                results.append(
                    [ops.linear(torch.linspace(-1, 1, 400).expand(t, -1), tensors) for t in (1, 4, 7)]
                )
        except RuntimeError:
            continue
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_a_token_alone_gives_the_bits_that_it_gives_among_others(isa, mode):
    tensors = oracle.random_tensors([(5, 64), (3, 96)], 96)
    x = torch.randn(11, 160)
    together = ops.linear(x, tensors)
    assert all(torch.equal(ops.linear(x[i : i + 1], tensors)[0], together[i]) for i in range(11))


def test_zeros_give_zeros_and_infinities_give_nan_in_their_token_alone(isa, mode):
    tensors = oracle.random_tensors([(4, 64), (3, 64)], 32)
    x = torch.randn(4, 128)
    x[0] = 0
    x[2, 5], x[3, 100] = torch.inf, torch.nan
    y = ops.linear(x, tensors)
    assert torch.equal(y[0], torch.zeros(32))
    assert y[1].isfinite().all()
    assert y[2].isnan().all()
    assert y[3].isnan().all()


def test_weights_that_may_overflow_half_keep_to_the_exact_kernels(mode):
    tensors = oracle.random_tensors([(8, 32), (4, 32)], 32)
    tensors["q_scale_max"].fill_(60000)
    x = torch.rand(2, 64)
    ours = ops.linear(x, tensors)
    with use_activations("float"):
        assert torch.equal(ours.nan_to_num(1), ops.linear(x, tensors).nan_to_num(1))


def test_tensors_changed_in_place_are_repacked(mode):
    tensors = oracle.random_tensors([(4, 64)], 32)
    x = torch.randn(2, 64)
    ops.linear(x, tensors)
    tensors["q_weight"].bitwise_not_()
    assert_within_bound(ops.linear(x, tensors), x, tensors, mode, 32)


def test_a_repacked_copy_goes_with_the_tensors_it_was_made_of(mode):
    gc.collect()
    before = len(cache._cache)
    tensors = oracle.random_tensors([(4, 64)], 32)
    ops.linear(torch.randn(2, 64), tensors)
    assert len(cache._cache) == before + 1
    del tensors
    gc.collect()
    assert len(cache._cache) == before


def test_a_repacked_linear_takes_about_what_the_stored_one_takes():
    tensors = oracle.random_tensors([(5, 128), (4, 512), (3, 1280), (2, 128)], 1024)
    struct = describe_linear(Stored.of(tensors), None, 1024)
    assert sum(cache.sizes(struct)) < 1.02 * sum(tensor.nbytes for tensor in tensors.values())


def test_a_block_that_is_none_is_refused():
    block = torch.zeros(4096, dtype=torch.uint8)
    pointers = (ctypes.c_void_p * 1)(block.data_ptr())
    status = _native.library().dbrxq_repacked_linear(pointers, 1, 8, None, 1, None)
    with pytest.raises(ValueError, match="not a repacked linear"):
        _native.check(status, "linear")


# ---- Experts ----------------------------------------------------------------------------------------------

D, F, E, A = 96, 160, 5, 2
ROUTINGS = {
    "one token": (1, lambda g: torch.tensor([[3, 1]])),
    "some experts without tokens": (7, lambda g: torch.randint(0, 2, (7, A), generator=g) * 3),
    "all tokens to one expert": (40, lambda g: torch.full((40, A), 2)),
    "some tokens without experts": (9, lambda g: torch.randint(0, E + 1, (9, A), generator=g)),
    "no expert at all": (3, lambda g: torch.full((3, A), E)),
    "more tokens than a pass": (600, lambda g: torch.randint(0, E + 1, (600, A), generator=g)),
}


def random_experts(same_order):
    linears = []
    for e in range(E):
        own = []
        for role, (k, n) in enumerate(((D, F), (D, F), (F, D))):
            groups = [(6, 32), (4, 32), (3, k - 64)] if e % 2 else [(4, k - 32), (2, 32)]
            own.append(oracle.random_tensors(groups, n, seed=10 * e + role, scale=0.05))
        if same_order:
            own[1]["q_invperm"] = own[0]["q_invperm"].clone()
        linears.append(tuple(own))
    return linears


@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_agree_with_the_oracle(routing, isa, mode):
    generator = torch.Generator().manual_seed(3)
    tokens, route = ROUTINGS[routing]
    linears = random_experts(same_order=tokens % 2 == 0)
    x, weights = torch.randn(tokens, D, generator=generator), torch.rand(tokens, A, generator=generator)
    index = route(generator)
    ours = ops.experts(x, index, weights, *zip(*linears, strict=True))
    exact = oracle.experts(x, index, weights, linears, "silu")
    # The first two products add up to 6e-3 (one byte) or 2.5e-4 (two: the weights' rounding to half) of their
    # output. The third meets products, whose largest is three times as far out; the rest is chance.
    limit = 1.5 * {"int8": (1 + 1 + 3**2) ** 0.5 * 6e-3, "int16": 3**0.5 * 2.5e-4}[mode]
    assert oracle.rms(ours.double() - exact) <= limit * oracle.rms(exact)


def test_the_number_of_threads_changes_no_bit_of_the_experts_output(mode):
    linears = random_experts(same_order=False)
    for tokens in (1, 50):
        x, weights, index = torch.randn(tokens, D), torch.rand(tokens, A), torch.randint(0, E, (tokens, A))
        results = []
        for threads in (1, 2, 5):
            _native.set_threads(threads)
            results.append(ops.experts(x, index, weights, *zip(*linears, strict=True)))
        _native.set_threads(0)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


# ---- The setting ------------------------------------------------------------------------------------------


def test_the_setting_is_one_of_three_and_comes_back_after_a_block():
    assert activations() == "float"  # conftest.py
    with use_activations("int16"):
        assert activations() == "int16"
    assert activations() == "float"
    with pytest.raises(ValueError, match="'int4', expected one of int8, int16, float"):
        set_activations("int4")


@pytest.mark.parametrize(("value", "printed"), [("", "int8"), ("float", "float"), ("fast", "ValueError")])
def test_the_environment_names_the_setting(value, printed):
    code = (
        "from dbrx_quant.runtime.kernels.activations import activations\n"
        "try: print(activations())\n"
        "except ValueError as error: print(type(error).__name__)\n"
    )
    environment = {**os.environ, "DBRXQ_ACTIVATIONS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [printed], done.stderr
