"""Damaged linears, at random: every way to dequantize refuses them by a ValueError, or all agree."""

import random

import pytest
import torch

import oracles_ops as oracle
from dbrx_quant.runtime import dequantize_linear
from dbrx_quant.runtime.kernels import ops, reference
from dbrx_quant.runtime.kernels.stored import Stored

DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.float16,
    torch.float32,
    torch.bool,
)
NUMBERS = (-32768, -300, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 31, 32, 63, 64, 100, 32767)
HALVES = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 6e-8, 1.0, 600.0, 40000.0, 65504.0)


def damaged(rng):
    """The tensors of a linear, in most cases with some damage."""
    groups, n = oracle.SHAPES[rng.choice(list(oracle.SHAPES))]
    tensors = oracle.random_tensors(groups, n, rng.randrange(9), bias=rng.random() < 0.3)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        name = rng.choice(list(tensors))
        if isinstance(tensors[name], torch.Tensor) and is_plain(tensors[name]):
            tensors[name] = rng.choice(DAMAGES)(tensors[name], rng)
        if rng.random() < 0.03:
            del tensors[name]
        if rng.random() < 0.03:
            tensors[rng.choice(("q_perm", "bias"))] = torch.zeros(n, dtype=torch.float16)
    return tensors


def is_plain(tensor):
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def put(tensor, rng):
    made = tensor.clone(memory_format=torch.contiguous_format)
    if made.numel() and made.dtype != torch.bool:
        at = rng.randrange(made.numel())
        choices = HALVES if made.is_floating_point() else NUMBERS
        value = rng.choice(choices)
        if not made.is_floating_point() and rng.random() < 0.5:
            value = int(made.view(-1)[rng.randrange(made.numel())])
        info = None if made.is_floating_point() else torch.iinfo(made.dtype)
        made.view(-1)[at] = value if info is None else max(info.min, min(info.max, value))
    return made


def swap(tensor, rng):
    made = tensor.clone(memory_format=torch.contiguous_format)
    if made.numel() > 1:
        a, b = rng.sample(range(made.numel()), 2)
        made.view(-1)[[a, b]] = made.view(-1)[[b, a]]
    return made


def resize(tensor, rng):
    act = rng.randrange(7)
    if act < 3 and tensor.dim():
        axis, cut = rng.randrange(tensor.dim()), rng.choice((0, 1, 16, 32))
        return tensor.narrow(axis, 0, max(0, tensor.shape[axis] - cut)).contiguous()
    if act == 3:
        return torch.cat([tensor, tensor])
    return (tensor[None], tensor.reshape(-1), tensor.sum())[act - 4].to(tensor.dtype)


DAMAGES = (
    *(put, put, put, put, swap, swap, resize, resize),
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: torch.full_like(t, rng.choice((0, 1))),
    lambda t, rng: t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0],  # not contiguous
    lambda t, rng: rng.choice((None, t.tolist(), t.to("meta"), t.to_sparse() if t.dim() else t)),
)


def outcome(compute, *arguments):
    try:
        weight = compute(*arguments)
        weight = weight.where(~weight.isnan(), float("nan")).contiguous().view(torch.int16)  # one NaN for all
    except ValueError:
        return None
    return weight


def disagreements(seed):
    """What is wrong with how linear number `seed` is taken, a line each."""
    tensors = damaged(random.Random(seed))
    public, native = (outcome(f, tensors) for f in (dequantize_linear, ops.dequantize))
    found = [] if same(public, native) else ["dequantize_linear and ops.dequantize differ"]
    if public is None and all(isinstance(t, torch.Tensor) for t in tensors.values()):
        known = [tensors.get(suffix) for suffix in Stored._fields]
        if all(t is not None and is_plain(t) for t in known):
            n = known[0].shape[-1] if known[0].dim() else 0
            slow, fast = (outcome(f, *known, n) for f in (REFERENCE, ops.dequantize_op))
            found += [] if same(slow, fast) else ["the operator's backends differ"]
    return [f"seed {seed}: {line}" for line in found]


REFERENCE = ops.kernels(reference)["dequantize"]


def same(a, b):
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_all_ways_to_dequantize_agree_on_damaged_linears():
    assert [line for seed in range(400) for line in disagreements(seed)] == []


def test_some_damage_is_found_and_some_is_none():
    refused = [outcome(dequantize_linear, damaged(random.Random(seed))) is None for seed in range(60)]
    assert 20 < sum(refused) < 55


@pytest.mark.slow
def test_all_ways_to_dequantize_agree_on_five_thousand_damaged_linears():
    assert [line for seed in range(5000) for line in disagreements(seed)] == []
