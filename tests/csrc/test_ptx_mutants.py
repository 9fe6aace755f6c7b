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
        x[:, 63] = 3000  # an outlier in the last lane of a warp, which decides the scale of its token
        check_linear(device, linear_tensors(), x)

    return run


def experts(device):
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([[0, 1], [2, 1], [2, 0]])
    x, share = torch.randn(3, 64, generator=generator), torch.rand(3, 2, generator=generator) + 0.5
    check_experts(device, random_experts(3, 64, 64), x.half(), index, share)


CASES = {  # what runs, and the kernels that are altered
    "weights": (weights, ("reconstruct",)),
    "layout": (layout, ("repack", "unpack")),
    "3 tokens": (product(3, torch.float32), ("gemv", "prepare")),
    "20 tokens": (product(20, torch.float16), ("gemm",)),
    "experts": (experts, ("route", "combine", "gemv")),
}

HARMLESS = {  # faults that change nothing that is read
    ("route_kernel", "a store in global memory 4 bytes further"): "the rows of tiles that have no expert",
}


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
        "weights",
        "layout",
        "20 tokens",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("3 tokens", "experts")),
    ],
)
def test_every_fault_is_seen(case):
    tried, left = survivors(case, most=1)
    assert tried
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_faults_in_many_places_are_seen(case):
    tried, left = survivors(case, most=8)
    assert tried
    assert left == []
