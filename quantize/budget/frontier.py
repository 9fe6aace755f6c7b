"""Error against size over all targets at once: what each further bit would buy, and who would get it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dbrx_quant.quantize.budget.allocate import head_option, steps_by_gain
from dbrx_quant.quantize.measurement import Measurement


@dataclass(frozen=True)
class FrontierPoint:
    """The best allocation at one size.

    Attributes:
        bpw: bits per weight of the decoder's linears, at most what was asked for.
        kl: predicted KL divergence in nats per token, head included.
        bits: kind of linear → bits of all of that kind.
    """

    bpw: float
    kl: float
    bits: Mapping[str, int]


def frontier(
    measurement: Measurement,
    head_bits: int,
    targets: Sequence[float],
    kind: Callable[[str], str],
) -> list[FrontierPoint]:
    """The best allocations at rising targets, from one walk over the steps that `allocate` takes.

    A step too large for what is left of a target ends it there, where `allocate` looks for smaller ones: the
    difference is less than that step.

    Args:
        measurement: of the model.
        head_bits: width of the head.
        targets: bits per weight, rising; those below the least possible give the least possible.
        kind: name of a linear → the kind that its bits are counted under.
    """
    curves = [linear.options for linear in measurement.decoder.values()]
    kinds = [kind(name) for name in measurement.decoder]
    weights = measurement.decoder_weights
    bits = Counter[str]()
    for at, curve in enumerate(curves):
        bits[kinds[at]] += curve[0].bits
    total = sum(bits.values())
    error = math.fsum(curve[0].error for curve in curves)
    head = head_option(measurement.head, head_bits).error if measurement.head else 0.0
    points, steps = [], iter(steps_by_gain(curves))
    step = next(steps, None)
    for target in targets:
        while step is not None:
            at, to = step
            before, after = curves[at][to - 1], curves[at][to]
            added = after.bits - before.bits
            if total + added > target * weights:
                break
            total += added
            bits[kinds[at]] += added
            error -= before.error - after.error
            step = next(steps, None)
        points.append(FrontierPoint(total / weights, error + head, dict(bits)))
    return points


def rescaled(
    curve: Sequence[tuple[float, float]], known: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """A curve of summed errors, rescaled to known figures in which all linears act at once.

    Args:
        curve: (bits per weight, KL), both positive, of rising bits.
        known: (bits per weight, KL) as `predict` or a measurement gives it. Between two of them the factor
            changes with the bits, beyond the outermost it stays; without any the curve stays as it is.
    """
    if not curve or not known:
        return list(curve)
    bpw, logs = np.array([x for x, _ in curve]), np.log([y for _, y in curve])
    at, expected = np.array(sorted(known)).T
    factors = np.exp(np.interp(bpw, at, np.log(expected) - np.interp(at, bpw, logs)))
    return [(x, float(y * factor)) for (x, y), factor in zip(curve, factors, strict=True)]
