"""The CUDA kernels of a block of experts on the emulator: routing, every activation, splits, schedules."""

import ctypes

import pytest
import torch
from emulated import FLOATS, SANITIZED, WIDTHS, assert_as_accurate_as_torch

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import cuda
from dbrx_quant.runtime.kernels.stored import StoredList
from dbrx_quant.scripts.gpu import bench_gpu

pytestmark = pytest.mark.usefixtures("emulated")

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
    lists = [StoredList.of(role) for role in zip(*linears, strict=True)]
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


def test_the_table_of_experts_follows_modifications():
    linears = random_experts(1)
    x, weights, index = torch.randn(2, D), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    run_experts(x, index, weights, linears)
    linears[0][2]["q_weight"].bitwise_not_()
    exact = oracle.experts(x, index, weights, linears, "silu")
    assert torch.allclose(run_experts(x, index, weights, linears).double(), exact, rtol=1e-4, atol=1e-5)
