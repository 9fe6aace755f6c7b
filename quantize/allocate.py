"""Bits for every linear from one budget: a single price of a bit over all matrices, experts and blocks.

Minimise the sum of errors with the sum of bits within the budget. The curves are convex, so taking their
steps by falling gain per bit is the same as giving every linear its best option at one price of a bit
(Everett 1963); where the next step is too large, smaller ones follow, and the gap to the optimum is at most
one step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Option = tuple[int, float, str]  # bits on disk, error in nats per token, group map as text

HEAD = "lm_head"
HEAD_OVERHEAD_BITS = 0.35  # what scales and permutation may add to --head-bits


@dataclass(frozen=True)
class Strategy:
    """What each linear gets.

    Attributes:
        target_bpw: what was asked for.
        bpw: what the decoder's linears take on disk, overhead included, per weight.
        kl: predicted KL divergence in nats per token, head included: from `allocate` the sum of all errors,
            each to second order; `predict` knows better.
        choices: linear → its option.
    """

    target_bpw: float
    bpw: float
    kl: float
    choices: Mapping[str, Option]

    def to_json(self) -> dict[str, Any]:
        """As written to `strategy.json`."""
        return {
            "target_bpw": self.target_bpw,
            "bpw": self.bpw,
            "predicted_kl": self.kl,
            "linears": {
                name: {"bits": bits, "error": error, "groups": groups}
                for name, (bits, error, groups) in self.choices.items()
            },
        }


def weights_of(linears: Mapping[str, Any]) -> int:
    """Number of weights of the decoder's linears (the head is outside the budget)."""
    return sum(math.prod(entry["shape"]) for name, entry in linears.items() if name != HEAD)


def reachable_bpw(linears: Mapping[str, Any]) -> tuple[float, float]:
    """Least and most bits per weight that the measured options allow."""
    decoder = [entry["options"] for name, entry in linears.items() if name != HEAD]
    weights = weights_of(linears)
    return sum(o[0][0] for o in decoder) / weights, sum(o[-1][0] for o in decoder) / weights


def check_targets(targets: Sequence[float], low: float, high: float) -> None:
    """Raise ValueError, naming what is reachable, unless all targets lie from `low` to `high`."""
    for target in targets:
        if not low <= target <= high:
            raise ValueError(
                f"{target} bits per weight is out of reach: for this model the floor is "
                f"{math.ceil(low * 1e4) / 1e4} (2 bits everywhere, scales and permutation included) "
                f"and the most is {high:.2f}"
            )


def allocate(measurement: Mapping[str, Any], target_bpw: float, head_bits: int) -> Strategy:
    """Choose options for all linears.

    Args:
        measurement: from `measure`.
        target_bpw: bits per weight of the decoder's linears, all overhead included; met from below.
        head_bits: width of the head, apart from the budget.

    Raises:
        ValueError: the target is out of reach; the message says what is reachable.
    """
    linears = measurement["linears"]
    weights = weights_of(linears)
    check_targets((target_bpw,), *reachable_bpw(linears))
    names = [name for name in linears if name != HEAD]
    curves = [[(int(b), float(e), str(g)) for b, e, g in linears[name]["options"]] for name in names]
    choice = spend(curves, int(target_bpw * weights))
    choices = {name: curve[i] for name, curve, i in zip(names, curves, choice, strict=True)}
    bits = sum(option[0] for option in choices.values())
    if HEAD in linears:
        choices[HEAD] = head_option(linears[HEAD], head_bits)
    error = sum(option[1] for option in choices.values())
    return Strategy(target_bpw, bits / weights, error, choices)


def head_option(entry: Mapping[str, Any], head_bits: int) -> Option:
    """The head's best option of about `head_bits` bits a weight; exllamav2's head of 6 bits takes 6.37."""
    limit = (head_bits + HEAD_OVERHEAD_BITS) * math.prod(entry["shape"])
    fitting = [o for o in entry["options"] if o[0] <= limit]
    bits, error, groups = fitting[-1] if fitting else entry["options"][0]
    return int(bits), float(error), str(groups)


def steps_by_gain(curves: Sequence[Sequence[Option]]) -> list[tuple[int, int]]:
    """All steps (curve, option it leads to), those first that take off the most error for a bit."""
    steps = []
    for at, curve in enumerate(curves):
        gain = math.inf
        for i in range(len(curve) - 1):
            # Never more than the step before, lest rounding put a curve's steps out of order.
            gain = min(gain, (curve[i][1] - curve[i + 1][1]) / (curve[i + 1][0] - curve[i][0]))
            steps.append((gain, at, i + 1))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    return [(at, target) for _, at, target in steps]


def spend(curves: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of each curve, convex and by rising bits, with the least total error in `budget` bits."""
    chosen = [0] * len(curves)
    left = budget - sum(curve[0][0] for curve in curves)
    blocked: set[int] = set()
    for at, target in steps_by_gain(curves):
        cost = curves[at][target][0] - curves[at][target - 1][0]
        if at in blocked:
            continue
        if cost > left:  # a smaller step of another curve may still fit
            blocked.add(at)
            continue
        chosen[at], left = target, left - cost
    return chosen
