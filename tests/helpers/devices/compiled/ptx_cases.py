"""What the tests run on the interpreter: devices by target, and operators with their oracles."""

import functools
import re

import pytest
import torch
from emulated import assert_as_accurate_as_torch, linear
from ptx_actions import NEEDS
from ptx_build import build, why_not
from ptx_device import Device, short_name

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import cuda
from dbrx_quant.runtime.kernels.stored import StoredList

TARGETS = (80, *(pytest.param(target, marks=pytest.mark.slow) for target in (75, 90, 120)))
EVERY_WIDTH = [(8, 32), (6, 64), (5, 32), (4, 64), (3, 64), (2, 48)]
WIDTHS = (8, 6, 5, 4, 3, 2)


@functools.cache
def built(target):
    """The build for a target; the test is skipped, with the reason, where there is none."""
    reason = why_not()
    if reason is None:
        try:
            return build(target)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    pytest.skip(reason)


@functools.cache
def shared_device(target):
    """A device for a target, whose kernels are read once for all tests."""
    made = built(target)
    for text in made.texts():
        for needed, words in NEEDS.items():
            found = [
                word
                for word in words
                if re.search(rf"^\s*(@!?%p\d+\s+)?{re.escape(word)}", text, re.MULTILINE)
            ]
            if needed > target and found:
                pytest.skip(f"the sources do not compile for sm_{target} yet: {found[0]} needs sm_{needed}")
    return Device(made)


def check_linear(device, tensors, x, out_features=None, multiprocessors=3):
    """Runs y = x W + bias on a device and holds it to the oracle; returns y."""
    n = out_features or tensors["q_weight"].shape[1]
    with device.running(multiprocessors):
        ours = linear(x, tensors, n)
    exact = oracle.linear(x, tensors, n)
    if x.dtype == torch.float32:  # 22 bits of x a product, not 24
        weight = oracle.dequantize(tensors)[:, :n].double().abs()
        assert ((ours.double() - exact).abs() <= 2**-21 * (x.abs().double() @ weight) + 1e-6).all()
    else:
        plain = oracle.linear(x, tensors, n, torch.float32).to(x.dtype)
        assert_as_accurate_as_torch(ours, exact, plain)
    return ours


def random_experts(count, hidden, ffn):
    """`count` experts as (gate, up, down), widths mixed."""
    return [
        tuple(
            oracle.random_tensors([(WIDTHS[(e + role) % 5], 32), (2, k - 32)], n, seed=3 * e + role)
            for role, (k, n) in enumerate(((hidden, ffn), (hidden, ffn), (ffn, hidden)))
        )
        for e in range(count)
    ]


def check_experts(device, linears, x, index, weights, activation="silu", multiprocessors=3):
    """Runs a block of experts on a device and holds it to the oracle; returns y."""
    lists = [StoredList.of(role) for role in zip(*linears, strict=True)]
    with device.running(multiprocessors):
        ours = cuda.experts(x, index, weights, *lists, activation)
    exact = oracle.experts(x, index, weights, linears, activation)
    if x.dtype == torch.float32:
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    else:
        plain = oracle.experts(x, index, weights, linears, activation, torch.float32).to(x.dtype)
        assert_as_accurate_as_torch(ours, exact, plain)
    return ours


def names(device, since):
    """Short names of the launches after the first `since`."""
    return [short_name(launch.kernel) for launch in device.launches[since:]]
