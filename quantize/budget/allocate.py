"""Bits for every linear from one budget: a single price of a bit over all matrices, experts and blocks.

Minimise the sum of errors with the sum of bits within the budget. The curves are convex, so taking their
steps by falling gain per bit is the same as giving every linear its best option at one price of a bit
(Everett 1963); where the next step is too large, smaller ones follow, and the gap to the optimum is at most
one step.
"""

import math
from collections.abc import Mapping, Sequence

from dbrx_quant.quantize.budget.strategy import Strategy
from dbrx_quant.quantize.measurement import HEAD, LinearMeasurement, Measurement, Option

HEAD_OVERHEAD_BITS = 0.35  # what scales and permutation may add to --head-bits


def check_targets(targets: Sequence[float], low: float, high: float) -> None:
    """Raise ValueError, naming what is reachable, unless all targets lie from `low` to `high`."""
    for target in targets:
        if not low <= target <= high:
            raise ValueError(
                f"{target} bits per weight is out of reach: for this model the floor is "
                f"{math.ceil(low * 1e4) / 1e4} (2 bits everywhere, scales and permutation included) "
                f"and the most is {high:.2f}"
            )


def allocate(measurement: Measurement, target_bpw: float, head_bits: int) -> Strategy:
    """Choose options for all linears.

    Args:
        measurement: of the model.
        target_bpw: bits per weight of the decoder's linears, all overhead included; met from below.
        head_bits: width of the head, apart from the budget.

    Raises:
        ValueError: the target is out of reach; the message says what is reachable.
    """
    check_targets((target_bpw,), *measurement.reachable_bpw)
    curves = {name: linear.options for name, linear in measurement.decoder.items()}
    choice = spend(list(curves.values()), int(target_bpw * measurement.decoder_weights))
    chosen = {name: curve[i] for (name, curve), i in zip(curves.items(), choice, strict=True)}
    return strategy_of(measurement, target_bpw, head_bits, chosen)


def strategy_of(
    measurement: Measurement, target_bpw: float, head_bits: int, chosen: Mapping[str, Option]
) -> Strategy:
    """The strategy that gives the decoder's linears the options chosen, and the head what it takes."""
    bits = sum(option.bits for option in chosen.values())
    choices = dict(chosen)
    if measurement.head is not None:
        choices[HEAD] = head_option(measurement.head, head_bits)
    error = sum(option.error for option in choices.values())
    return Strategy(target_bpw, bits / measurement.decoder_weights, error, choices)


def head_option(head: LinearMeasurement, head_bits: int) -> Option:
    """The head's best option of about `head_bits` bits a weight; exllamav2's head of 6 bits takes 6.37."""
    limit = (head_bits + HEAD_OVERHEAD_BITS) * head.weights
    fitting = [option for option in head.options if option.bits <= limit]
    return fitting[-1] if fitting else head.options[0]


def steps_by_gain(curves: Sequence[Sequence[Option]]) -> list[tuple[int, int]]:
    """All steps (curve, option it leads to), those first that take off the most error for a bit."""
    steps = []
    for at, curve in enumerate(curves):
        gain = math.inf
        for i in range(len(curve) - 1):
            # Never more than the step before, lest rounding put a curve's steps out of order.
            gain = min(gain, (curve[i].error - curve[i + 1].error) / (curve[i + 1].bits - curve[i].bits))
            steps.append((gain, at, i + 1))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    return [(at, target) for _, at, target in steps]


def spend(curves: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of each curve, convex and by rising bits, with the least total error in `budget` bits."""
    chosen = [0] * len(curves)
    left = budget - sum(curve[0].bits for curve in curves)
    blocked: set[int] = set()
    for at, target in steps_by_gain(curves):
        cost = curves[at][target].bits - curves[at][target - 1].bits
        if at in blocked:
            continue
        if cost > left:  # a smaller step of another curve may still fit
            blocked.add(at)
            continue
        chosen[at], left = target, left - cost
    return chosen
