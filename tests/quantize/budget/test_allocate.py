"""One price of a bit over all linears: within the budget, near the optimum, and told when out of reach."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from measurements import linear
from measurements import measurement as made

from dbrx_quant.quantize.budget.allocate import HEAD_OVERHEAD_BITS, allocate, head_option, spend
from dbrx_quant.quantize.measurement import HEAD, Option


@st.composite
def curves(draw, most=5, options=5):
    """Curves by rising bits and falling error, convex."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        steps = draw(st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 10)), max_size=options - 1))
        steps.sort(key=lambda step: -step[1])  # falling gain per bit
        bits, error = draw(st.integers(1, 50)), sum(cost * ratio for cost, ratio in steps)
        curve = [Option(bits, error, "start")]
        for cost, ratio in steps:
            bits, error = bits + cost, error - cost * ratio
            curve.append(Option(bits, error, f"{cost} bits"))
        found.append(curve)
    return found


def total(curves, choice):
    chosen = [curve[i] for curve, i in zip(curves, choice, strict=True)]
    return sum(o.bits for o in chosen), sum(o.error for o in chosen)


def floor_of(curves):
    return sum(curve[0].bits for curve in curves)


@given(curves(), st.integers(0, 200))
def test_the_budget_is_never_exceeded(curves, extra):
    budget = floor_of(curves) + extra
    assert total(curves, spend(curves, budget))[0] <= budget


@settings(deadline=None)
@given(curves(), st.integers(0, 120))
def test_the_error_is_within_one_step_of_the_best_possible(curves, extra):
    budget = floor_of(curves) + extra
    best = min(
        error
        for choice in itertools.product(*(range(len(curve)) for curve in curves))
        for bits, error in [total(curves, choice)]
        if bits <= budget
    )
    ours = spend(curves, budget)
    untaken = [
        curve[i].error - curve[i + 1].error
        for curve, at in zip(curves, ours, strict=True)
        for i in range(at, len(curve) - 1)
    ]
    assert total(curves, ours)[1] <= best + max(untaken, default=0.0) + 1e-9


@given(curves(), st.integers(0, 120), st.integers(0, 120))
def test_more_budget_never_means_more_error(curves, first, second):
    low, high = sorted((first, second))
    floor = floor_of(curves)
    errors = [total(curves, spend(curves, floor + extra))[1] for extra in (low, high)]
    assert errors[1] <= errors[0] + 1e-9


@given(curves())
def test_a_budget_for_everything_buys_everything(curves):
    everything = [len(curve) - 1 for curve in curves]
    assert spend(curves, total(curves, everything)[0]) == everything
    assert spend(curves, floor_of(curves)) == [0] * len(curves)


@given(curves(), st.integers(0, 120))
def test_what_is_left_buys_no_further_step(curves, extra):
    budget = floor_of(curves) + extra
    ours = spend(curves, budget)
    left = budget - total(curves, ours)[0]
    next_steps = [
        curve[i + 1].bits - curve[i].bits for curve, i in zip(curves, ours, strict=True) if i + 1 < len(curve)
    ]
    assert all(step > left for step in next_steps)


def test_steps_whose_gains_differ_by_rounding_only_are_taken_in_order():
    errors = (10.056100181310406, 8.799087658646606, 0.0)  # the second step gains a shade more per bit
    curves = [[Option(bits, error, "") for bits, error in zip((1, 2, 9), errors, strict=True)]]
    assert (errors[1] - errors[2]) / 7 > errors[0] - errors[1]
    assert [spend(curves, budget) for budget in (1, 2, 8, 9)] == [[0], [1], [1], [2]]


SHAPE = (64, 64)


def measurement(curves, head=True):
    linears = {
        f"model.layers.{i}.self_attn.q_proj": linear(SHAPE, ((o.bits, o.error, o.groups) for o in curve))
        for i, curve in enumerate(curves)
    }
    if head:
        count = math.prod(SHAPE)
        options = [[int(count * (b + 0.3)), 4.0**-b, f"{b}:64"] for b in (2, 3, 4, 5, 6, 8)]
        linears[HEAD] = linear(SHAPE, options, "head")
    return made(linears)


def realistic(count=4):
    weights = math.prod(SHAPE)
    return [
        [Option(int(weights * (b + 0.35)), (1 + i) * 4.0**-b, f"{b}:64") for b in (2, 3, 4, 5, 6, 8)]
        for i in range(count)
    ]


@settings(deadline=None)
@given(st.floats(2.36, 8.3))
def test_a_strategy_stays_below_its_target_and_tells_its_bits_and_error(target):
    found = allocate(measurement(realistic()), target, 6)
    decoder = {name: option for name, option in found.choices.items() if name != HEAD}
    bits = sum(option.bits for option in decoder.values())
    assert bits <= target * 4 * math.prod(SHAPE)
    assert found.bpw == bits / (4 * math.prod(SHAPE))
    assert found.kl == pytest.approx(sum(option.error for option in found.choices.values()))
    assert found.to_json()["linears"][HEAD]["groups"] == "6:64"


def test_the_linear_with_more_to_gain_gets_more_bits():
    found = allocate(measurement(realistic()), 3.9, 6)
    bits = [found.choices[f"model.layers.{i}.self_attn.q_proj"].bits for i in range(4)]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


@given(st.sampled_from([2, 3, 4, 5, 6, 8]))
def test_the_head_is_apart_from_the_budget(head_bits):
    found = allocate(measurement(realistic()), 3.4, head_bits)
    without = allocate(measurement(realistic(), head=False), 3.4, head_bits)
    assert {n: o for n, o in found.choices.items() if n != HEAD} == dict(without.choices)
    assert found.bpw == without.bpw
    assert found.choices[HEAD].groups == f"{head_bits}:64"


def test_the_head_gets_the_most_bits_that_its_width_allows_else_its_fewest():
    limit = (3 + HEAD_OVERHEAD_BITS) * math.prod(SHAPE)
    options = [(int(limit) - 9, 3.0, "a"), (int(limit), 2.0, "b"), (int(limit) + 1, 1.0, "c")]
    head = linear(SHAPE, options, "head")
    assert head_option(head, 3).groups == "b"
    assert head_option(head, 2).groups == "a"


@pytest.mark.parametrize(
    ("target", "told"), [(2.3, "2.3499"), (0.0, "2.3499"), (8.36, "8.35"), (float("nan"), "2.3499")]
)
def test_a_target_out_of_reach_is_refused_with_what_is_reachable(target, told):
    with pytest.raises(ValueError, match=rf"out of reach.* {told}"):
        allocate(measurement(realistic()), target, 6)


def test_the_floor_that_a_refusal_names_is_accepted():
    curves = realistic(3)
    curves[0][0] = replace(curves[0][0], bits=curves[0][0].bits + 1)  # a floor of no round number
    low, high = measurement(curves).reachable_bpw
    with pytest.raises(ValueError, match="floor is") as refused:
        allocate(measurement(curves), low - 1e-6, 6)
    named = float(str(refused.value).split("floor is ")[1].split()[0])
    assert named >= low
    assert allocate(measurement(curves), named, 6).bpw == pytest.approx(low)
    assert allocate(measurement(curves), high, 6).bpw == pytest.approx(high)


@settings(deadline=None)
@given(curves(most=4))
def test_a_measurement_of_one_option_each_has_one_target(curves):
    assume(all(len(curve) == 1 for curve in curves) or len(curves) < 3)
    low, high = measurement(curves).reachable_bpw
    assert low <= high
    assert allocate(measurement(curves), low, 6).bpw <= low
