"""The CUDA kernels, compiled for the host by csrc/emulator, through the real backend.

Exact weights, products against fp64, every width and ragged shape, routing, schedules; and the emulator's own
claims, on kernels with known faults.
"""

import ctypes
import os
import subprocess
import sys

import cuda_emulator
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import oracles_ops as oracle
from dbrx_quant.runtime import _cuda
from dbrx_quant.runtime.backends import cuda
from dbrx_quant.scripts import bench_gpu

SANITIZED = os.environ.get("DBRXQ_EMULATOR") == "sanitized"  # the same tests, in the process of the last one
WIDTHS = (8, 6, 5, 4, 3, 2)
SHAPES = {
    "one group": ([(4, 32)], 32),
    "ragged last group": ([(6, 64), (3, 128), (3, 32)], 96),
    "every width": ([(8, 32), (6, 32), (5, 64), (4, 96), (3, 64), (2, 32)], 160),
    "a 2-bit tail of 16 rows": ([(4, 32), (2, 80)], 64),
    "a tail alone": ([(2, 16)], 32),
    "more than a block's columns": ([(5, 128), (3, 416), (2, 48)], 288),
    "rows for several splits": ([(6, 32), (4, 480), (3, 512), (2, 528)], 64),
}
TOKENS = (1, 3, 8, 9, 16, 17, 65)  # both sides of every switch between kernels and tiles
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def library():
    path = cuda_emulator.build(SANITIZED)
    if path is None:
        pytest.skip("the emulator needs g++")
    return _cuda.load(path)


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_cuda, "_library", library)
    library.dbrxq_emulator_seed(ctypes.c_uint64(0))
    return library


def stored(tensors):
    return [tensors[suffix] for suffix in oracle.SUFFIXES]


def dequantize(tensors, out_features=None):
    n = tensors["q_weight"].shape[1]
    return cuda.dequantize(*stored(tensors), n if out_features is None else out_features)


def linear(x, tensors, out_features=None):
    n = tensors["q_weight"].shape[1]
    return cuda.linear(x, *stored(tensors), tensors.get("bias"), n if out_features is None else out_features)


def assert_as_accurate_as_torch(ours, exact, plain, what=""):
    """Our rounding error may be at most twice that of plain torch with the same dtypes, in rms."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    limit = 2 * oracle.rms(plain.double() - exact) + 1e-30
    assert oracle.rms(ours.double() - exact) <= limit, what


# ---- Exact weights ----------------------------------------------------------------------------------------


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


# ---- Products ---------------------------------------------------------------------------------------------


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


def test_bfloat16_activations_beyond_halfs_range_are_scaled():
    tensors = oracle.random_tensors([(4, 64)], 32)
    x = torch.randn(4, 64) * torch.tensor([1e30, 1e-30, 1e5, 0.0])[:, None]
    x[2, 5] = -3e8  # an outlier, as trained models have them
    x = x.bfloat16()
    exact = oracle.linear(x, tensors, 32)
    for t in range(4):
        plain = oracle.linear(x[t : t + 1], tensors, 32, torch.float32).bfloat16()
        assert_as_accurate_as_torch(linear(x, tensors)[t : t + 1], exact[t : t + 1], plain, f"token {t}")


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


# ---- Experts ----------------------------------------------------------------------------------------------

D, F, E, A = 96, 160, 5, 2
ROUTINGS = {
    "one token": (1, lambda g: torch.tensor([[3, 1]])),
    "some experts without tokens": (7, lambda g: torch.randint(0, 2, (7, A), generator=g) * 3),
    "all tokens to one expert": (40, lambda g: torch.full((40, A), 2)),
    "130 tokens": (130, lambda g: torch.randint(0, E, (130, A), generator=g)),
    "some tokens without experts": (9, lambda g: torch.randint(0, E + 1, (9, A), generator=g)),
    "no expert at all": (3, lambda g: torch.full((3, A), E)),
    "indices that no expert has": (4, lambda g: torch.tensor([[-1, 2], [E + 7, 0], [1, 1], [3, -9]])),
}


def random_experts(count=E, hidden=D, ffn=F):
    linears = []
    for e in range(count):
        own = []
        for role, (k, n) in enumerate(((hidden, ffn), (hidden, ffn), (ffn, -(-hidden // 32) * 32))):
            first = WIDTHS[(e + role) % 5]
            own.append(oracle.random_tensors([(first, 32), (2, k - 32)], n, seed=3 * e + role))
        linears.append(tuple(own))
    return linears


def run_experts(x, index, weights, linears, activation="silu"):
    lists = [[t for tensors in role for t in stored(tensors)] for role in zip(*linears, strict=True)]
    return cuda.experts(x, index, weights, *lists, activation)


def legal(index):
    return torch.where((index >= 0) & (index < E), index, E)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_are_as_accurate_as_torch(routing, dtype):
    tokens, choose = ROUTINGS[routing]
    if SANITIZED and tokens > 50:
        pytest.skip("the sanitizers have seen these kernels with fewer tokens")
    linears = random_experts()
    index = choose(torch.Generator().manual_seed(1))
    x, weights = torch.randn(tokens, D).to(dtype), torch.rand(tokens, A)
    ours = run_experts(x, index, weights, linears)
    exact = oracle.experts(x, legal(index), weights, linears, "silu")
    if dtype == torch.float32:
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    else:
        plain = oracle.experts(x, legal(index), weights, linears, "silu", torch.float32).to(dtype)
        assert_as_accurate_as_torch(ours, exact, plain, routing)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_every_activation_agrees_with_its_formula(activation):
    linears = random_experts(2)
    x, weights, index = torch.randn(5, D) * 3, torch.rand(5, A), torch.randint(0, 2, (5, A))
    ours = run_experts(x, index, weights, linears, activation)
    exact = oracle.experts(x, index, weights, linears, activation)
    assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_experts_of_other_sizes_and_a_2_bit_tail():
    linears = [
        tuple(
            oracle.random_tensors(groups, n, seed)
            for seed, (groups, n) in enumerate(
                (([(4, 32), (2, 48)], 288), ([(2, 80)], 288), ([(3, 288)], 96))
            )
        )
    ]
    for tokens in (1, 12, 40):
        x, weights, index = torch.randn(tokens, 80), torch.rand(tokens, 1), torch.zeros(tokens, 1).long()
        exact = oracle.experts(x, index, weights, linears, "silu")
        assert torch.allclose(run_experts(x, index, weights, linears).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_whose_input_channels_are_split_over_blocks(emulated, tokens):
    linears = random_experts(2, hidden=576, ffn=544)
    x, weights, index = torch.randn(tokens, 576), torch.rand(tokens, 1), torch.randint(0, 2, (tokens, 1))
    exact = oracle.experts(x, index, weights, linears, "silu")
    results = []
    for seed in range(3):
        emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
        results.append(run_experts(x, index, weights, linears))
    assert torch.allclose(results[0].double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.slow
def test_more_tokens_than_a_pass_give_the_same_bits_as_their_parts():
    linears = random_experts()
    x, weights = torch.randn(520, D).half(), torch.rand(520, A)
    index = torch.randint(0, E, (520, A))
    whole = run_experts(x, index, weights, linears)
    exact = oracle.experts(x, index, weights, linears, "silu")
    assert torch.allclose(whole.double(), exact, rtol=1e-2, atol=1e-3 * exact.abs().max().item())
    assert torch.equal(run_experts(x[512:], index[512:], weights[512:], linears), whole[512:])


def test_schedules_change_no_bit_of_the_experts_output(emulated):
    linears = random_experts()
    for tokens in (2, 24):
        x, weights, index = torch.randn(tokens, D), torch.rand(tokens, A), torch.randint(0, E, (tokens, A))
        results = []
        for seed in range(4):
            emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
            results.append(run_experts(x, index, weights, linears))
        assert all(torch.equal(other, results[0]) for other in results[1:]), f"{tokens} tokens"


@pytest.mark.slow
def test_the_checks_of_the_gpu_benchmark_pass_and_see_a_wrong_kernel(monkeypatch):
    if SANITIZED:
        pytest.skip("the sanitizers have seen these kernels")
    monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
    assert bench_gpu.check() == []
    monkeypatch.setattr(cuda, "experts", lambda x, *rest: torch.zeros_like(x))
    assert any("experts" in fault for fault in bench_gpu.check())


# ---- The backend's memory ---------------------------------------------------------------------------------


def test_the_device_layout_is_made_once_and_follows_modifications():
    tensors = oracle.random_tensors([(4, 64)], 64)
    first = cuda.device_linear(*stored(tensors))
    assert cuda.device_linear(*stored(tensors)) is first
    tensors["q_weight"].bitwise_not_()
    assert oracle.first_difference(dequantize(tensors), oracle.dequantize(tensors)) is None
    tensors["q_scale"] = tensors["q_scale"].bitwise_not()  # another tensor beside the same q_weight
    assert oracle.first_difference(dequantize(tensors), oracle.dequantize(tensors)) is None


def test_the_table_of_experts_follows_modifications():
    linears = random_experts(1)
    x, weights, index = torch.randn(2, D), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    run_experts(x, index, weights, linears)
    linears[0][2]["q_weight"].bitwise_not_()
    exact = oracle.experts(x, index, weights, linears, "silu")
    assert torch.allclose(run_experts(x, index, weights, linears).double(), exact, rtol=1e-4, atol=1e-5)


def test_the_device_layout_lives_as_long_as_the_words_of_the_file():
    tensors = oracle.random_tensors([(4, 64)], 64)
    dequantize(tensors)
    before = len(cuda._linears)
    del tensors["q_weight"]
    assert len(cuda._linears) == before - 1


def test_broken_tables_are_refused():
    tensors = oracle.random_tensors([(4, 32), (3, 32)], 32)
    tensors["q_groups"][2] = 7
    with pytest.raises(ValueError, match="q_groups"):
        dequantize(tensors)
    tensors = oracle.random_tensors([(4, 64)], 32)
    tensors["q_invperm"][0] = tensors["q_invperm"][1]
    with pytest.raises(ValueError, match="q_invperm"):
        dequantize(tensors)


# ---- The emulator itself ----------------------------------------------------------------------------------


def selftest(library, copies, fault):
    """The results of a kernel of csrc/emulator/selftest.cu under one schedule, and what they should be."""
    values = torch.arange(512, dtype=torch.int32)
    out = torch.full_like(values, -1)
    library.dbrxq_emulator_selftest(
        copies, fault, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr())
    )
    return (out, values) if copies else (out[:128], values[:128] ^ 32)


NO_FAULT, NO_BARRIER, NO_WAIT, OUT_OF_BOUNDS, MISALIGNED = range(5)


@pytest.mark.parametrize(("copies", "fault"), [(0, NO_BARRIER), (1, NO_WAIT)])
def test_a_missing_barrier_or_wait_shows_under_every_schedule_tried(emulated, copies, fault):
    for seed in range(20):
        for chosen in (NO_FAULT, fault):
            emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
            out, wanted = selftest(emulated, copies, chosen)
            assert torch.equal(out, wanted) == (chosen == NO_FAULT), f"seed {seed}"


def sanitized(*arguments):
    """Runs python with the sanitized emulator; the finished process."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "DBRXQ_EMULATOR": "sanitized",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.fixture(scope="module")
def sanitizers():
    if SANITIZED:
        pytest.skip("these are the tests that the sanitized process runs")
    if cuda_emulator.build(sanitized=True) is None:
        pytest.skip("the sanitizers need g++")


def test_wild_and_misaligned_accesses_stop_the_sanitized_emulator(sanitizers):
    code = (
        "import ctypes, sys; import cuda_emulator; import numpy as np\n"
        "library = ctypes.CDLL(str(cuda_emulator.build(True)))\n"
        "a, b = np.zeros(512, np.int32), np.zeros(512, np.int32)\n"
        "library.dbrxq_emulator_selftest(int(sys.argv[1]), int(sys.argv[2]),\n"
        "                                ctypes.c_void_p(a.ctypes.data), ctypes.c_void_p(b.ctypes.data))\n"
    )
    os.environ["PYTHONPATH"] = os.path.dirname(cuda_emulator.__file__)
    try:
        for copies, fault, message in (
            (0, NO_FAULT, ""),
            (0, OUT_OF_BOUNDS, "heap-buffer-overflow"),
            (1, NO_FAULT, ""),
            (1, MISALIGNED, "misaligned address"),
        ):
            done = sanitized("-c", code, str(copies), str(fault))
            assert (done.returncode == 0) == (fault == NO_FAULT), done.stderr
            assert message in done.stderr
    finally:
        del os.environ["PYTHONPATH"]


@pytest.mark.parametrize("extent", ["a few", pytest.param("all", marks=pytest.mark.slow)])
def test_the_kernels_pass_under_the_sanitizers(sanitizers, extent):
    chosen = [
        "-k",
        "(linear_is_as_accurate and (tail or ragged)) or (experts_are and (some or one)) or map_is_exact",
    ]
    done = sanitized("-m", "pytest", "-q", "-x", __file__, *(chosen if extent == "a few" else []))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
