"""The interpreter sees faults: kernels with one line of PTX altered fail a check, or the oracle."""

import functools

import pytest
import torch
from emulated import dequantize
from ptx_cases import check_experts, check_linear, random_experts, shared_device
from ptx_device import short_name
from ptx_mutants import FAULTS, mutants
from ptx_text import PtxError

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.kernels.stored import Stored

TARGET = 80
GROUPS, N = [(5, 32), (4, 256), (2, 272)], 160


@functools.cache
def linear_tensors():
    return oracle.random_tensors(GROUPS, N)


def weights(device):
    tensors = oracle.random_tensors([(5, 32), (4, 32), (3, 32)], 64, scale=0.5)
    with device.running():
        ours = dequantize(tensors)
    assert oracle.first_difference(ours, oracle.dequantize(tensors)) is None


def layout(device):
    tensors = oracle.random_tensors([(5, 32), (2, 48)], 64)
    with device.running():
        tiled = cuda_tiles.tile(Stored.of(tensors))
        back = cuda_tiles.untile(Stored.of({**tensors, "q_weight": tiled}))
    assert oracle.first_difference(back, tensors["q_weight"]) is None


def product(tokens, dtype):
    def run(device):
        x = torch.randn(tokens, 560, generator=torch.Generator().manual_seed(1)).to(dtype)
        if dtype != torch.float16:  # else 3000 decides nothing, and its rounding hides what others do
            x[:, 255] = (
                3000  # in the last lane of a warp, alone or with seven others; it decides the token's scale
            )
        check_linear(device, linear_tensors(), x)

    return run


def experts(times):
    def run(device):
        generator = torch.Generator().manual_seed(1)
        index = torch.tensor([[0, 1], [2, 1], [2, 0]]).repeat(times, 1)
        x = torch.randn(len(index), 64, generator=generator)
        share = torch.rand(len(index), 2, generator=generator) + 0.5
        check_experts(device, random_experts(3, 64, 64), x.half(), index, share)

    return run


CASES = {  # what runs, and the kernels that are altered
    "weights": (weights, ("reconstruct",)),
    "layout": (layout, ("repack", "unpack")),
    "3 tokens": (product(3, torch.float32), ("few",)),
    "12 tokens": (product(12, torch.float16), ("gemv", "prepare")),
    "20 tokens": (product(20, torch.float16), ("gemm",)),
    "experts of 3 tokens": (experts(1), ("few",)),
    "experts of 12 tokens": (experts(4), ("route", "combine", "gemv")),
}

HARMLESS = {  # faults that change nothing that is read
    ("route_kernel", "a store in global memory 4 bytes further"): "the rows of tiles that have no expert",
}

LITTLE = pytest.mark.xfail(
    reason="few_kernel: a maximum may be found in many ways, and a barrier be another's without a router"
)


def survivors(case, most):
    """(mutants tried, those that nobody saw) of a case."""
    run, altered = CASES[case]
    device = shared_device(TARGET)
    machine = device.machine
    machine.seed(0)
    machine.executed.clear()
    since = len(device.launches)
    run(device)
    kernels = dict.fromkeys(launch.kernel for launch in device.launches[since:])
    executed = {name: machine.executed_lines(name) for name in kernels}
    steps = 20 * max(map(len, executed.values()))
    tried, left = 0, []
    for name in kernels:
        if not short_name(name).startswith(altered):
            continue
        for fault in (one for one in FAULTS if (short_name(name), one.name) not in HARMLESS):
            for mutant in mutants(machine.texts[name], executed[name], fault, most):
                tried += 1
                with machine.altered(name, mutant.text):
                    machine.steps = steps
                    try:
                        run(device)
                    except (PtxError, AssertionError):
                        continue
                left.append(f"{short_name(name)}, line {mutant.line}: {fault.name}")
    return tried, left


@pytest.mark.parametrize(
    "case",
    [
        "layout",
        "20 tokens",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("weights", "12 tokens", "experts of 12 tokens")
        ),
        *(pytest.param(case, marks=[pytest.mark.slow, LITTLE]) for case in CASES if "3 tokens" in case),
    ],
)
def test_every_fault_is_seen(case):
    tried, left = survivors(case, most=1)
    assert tried
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[LITTLE] if "3 tokens" in case else []) for case in CASES]
)
def test_faults_in_many_places_are_seen(case):
    tried, left = survivors(case, most=8)
    assert tried
    assert left == []
