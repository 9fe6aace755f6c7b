"""The curve over all sizes agrees with allocations made one by one."""

import math
import random

import pytest
from measurements import linear
from measurements import measurement as made

from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.budget.frontier import frontier, rescaled


def measurement(linears=30, options=20, seed=0):
    """Convex curves of random linears, and a head."""
    choose = random.Random(seed)
    found = {}
    for i in range(linears):
        shape = [64, 32 * choose.randint(1, 4)]
        weights, scale = math.prod(shape), choose.uniform(0.1, 3)
        points = [2.1 + 6 * n / (options - 1) for n in range(options)]
        curve = [[int(b * weights), scale * weights * 4**-b / 1e5, "2:32x2"] for b in points]
        found[f"layers.{i}.{'w1' if i % 3 else 'q_proj'}"] = linear(shape, curve)
    found["lm_head"] = linear([64, 64], [[26000, 0.01, "6:32x2"]], "head")
    return made(found)


def test_points_agree_with_allocations(tmp_path):
    measured = measurement()
    targets = [2.5, 3.0, 3.1, 4.0, 5.5]
    for target, point in zip(targets, frontier(measured, 6, targets, lambda name: name[-2:]), strict=True):
        strategy = allocate(measured, target, 6)
        assert point.bpw <= target
        assert point.bpw == pytest.approx(strategy.bpw, rel=0.02)
        assert point.kl == pytest.approx(strategy.kl, rel=0.05)
        assert strategy.kl <= point.kl * (1 + 1e-9)  # it still takes smaller steps


def test_bits_are_counted_by_kind():
    measured = measurement()
    point, most = frontier(measured, 6, [3.0, 100.0], lambda name: name.rpartition(".")[2])
    assert point.bits.keys() == {"w1", "q_proj"}
    weights = sum(math.prod(v.shape) for k, v in measured.linears.items() if k != "lm_head")
    assert sum(point.bits.values()) == pytest.approx(point.bpw * weights)
    assert most.bpw == pytest.approx(measured.reachable_bpw[1])


def test_a_target_below_the_floor_gives_the_floor():
    measured = measurement()
    low = measured.reachable_bpw[0]
    points = frontier(measured, 6, [1.0, low], str)
    assert [point.bpw for point in points] == pytest.approx([low, low])
    assert points[0].kl > frontier(measured, 6, [3.0], str)[0].kl


def test_an_anchored_curve_goes_through_what_is_known():
    curve = [(2.0, 0.8), (2.5, 0.4), (3.0, 0.2), (4.0, 0.05), (5.0, 0.0125)]
    assert rescaled(curve, []) == curve
    assert [kl for _, kl in rescaled(curve, [(3.0, 0.3)])] == pytest.approx([1.2, 0.6, 0.3, 0.075, 0.01875])
    moved = dict(rescaled(curve, [(4.0, 0.05), (2.5, 0.8)]))
    assert moved[2.5] == pytest.approx(0.8)
    assert moved[4.0] == pytest.approx(0.05)
    assert moved[2.0] == pytest.approx(1.6), "beyond the outermost the factor stays"
    assert moved[5.0] == pytest.approx(0.0125)
    assert 0.2 < moved[3.0] < 0.4
