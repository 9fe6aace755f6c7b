"""What the quality benchmark varies: every study is a list of variants, each with one thing changed.

A variant is data: the allocation that chooses its group maps, fields of `QuantizeJob`, and names of the
package that are replaced while it is measured or quantized. To add one, write it into STUDIES.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.moments import Moments, SplitMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage
from dbrx_quant.calibration.text.tokens import HELD_OUT_EVERY
from dbrx_quant.quantize.budget.allocate import allocate, spend, strategy_of
from dbrx_quant.quantize.budget.groups import GROUP_ROWS, lower_hull
from dbrx_quant.quantize.budget.strategy import Strategy
from dbrx_quant.quantize.measurement import LinearMeasurement, Measurement, Option
from dbrx_quant.quantize.solve.grid import SCALES, inverse_scale, round_half, scale_table, search_group
from dbrx_quant.quantize.solve.ldlq import Factor, SolvedLinear
from dbrx_quant.quantize.solve.repair import NO_REPAIR
from dbrx_quant.quantize.solve.shrinkage import choose_shrinkage
from dbrx_quant.runtime.exl2.format import WIDTHS, GroupMap, uniform_groups

Allocation = Callable[
    [Measurement, float, int], Strategy
]  # measurement, target in bits per weight, head bits

LENGTH = 256  # tokens of a row made from --calibration-text
MEASURE, CURVE, SHRINKAGE, SOLVE = (
    f"dbrx_quant.quantize.{name}"
    for name in ("budget.measure", "budget.curve", "solve.shrinkage", "solve.linear")
)


@dataclass(frozen=True)
class Setting:
    """What a measurement is made with; variants of one setting share it.

    Attributes:
        name: of its file.
        patches: full name → what stands there instead, while measuring and while quantizing.
        tokens: how many of --calibration-text; None: the file of --calibration.
        job: fields of MeasureJob.
        left_out: which seventh of the rows takes the held-out text's place and is not calibrated on.
    """

    name: str = "standard"
    patches: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    left_out: int | None = None


@dataclass(frozen=True)
class Variant:
    """A way to quantize.

    Attributes:
        name: as in the tables; equal names are the same variant.
        setting: of its measurement.
        allocation: chooses the group maps.
        patches: full name → what stands there instead, while quantizing only.
        job: fields of QuantizeJob.
    """

    name: str
    setting: Setting = field(default_factory=Setting)
    allocation: Allocation = allocate
    patches: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)


# Scales


@dataclass(frozen=True)
class Rows:
    """A group of rows to be rounded.

    Attributes:
        weight: [rows, N].
        targets: [rows, N] float32, the weight with the feedback of earlier groups.
        bits: width of the codes.
        upper: [rows, rows], the factor's block of these rows.
        pivots: [rows].
    """

    weight: Tensor
    targets: Tensor
    bits: int
    upper: Tensor
    pivots: Tensor

    def round(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and values [rows, ..., N] and loss [..., N] of nearest values on grids of scales [..., N]."""
        half_range, inverse = 1 << (self.bits - 1), inverse_scale(scale)
        targets = self.targets.view(len(self.targets), *[1] * (scale.dim() - 1), -1)
        targets = targets.repeat(1, *scale.shape[:-1], 1)
        codes, values, loss = torch.empty_like(targets), torch.empty_like(targets), torch.zeros_like(scale)
        for row, target in enumerate(targets):
            code = (target * inverse).round().clamp(-half_range, half_range - 1)
            codes[row], values[row] = code + half_range, round_half(code * scale)
            loss += self.pivots[row] * (target - values[row]).square()
            later = self.upper[row, row + 1 :].view(-1, *[1] * scale.dim())
            targets[row + 1 :] += later * (self.weight[row] - values[row])
        return codes, values, loss


Scales = Callable[[Rows], tuple[Tensor, Tensor]]  # → scale_max (float16 scalar), scale_codes [N] uint8


def exllamav2_scales(rows: Rows) -> tuple[Tensor, Tensor]:
    """exllamav2's rule: one clip factor for the whole group, chosen by the unweighted sum of |error|^3.5.

    A column's scale is its largest magnitude, set half a step inside the codes' range and rounded to the
    nearest of the sixteen scales below the largest column's; the factor then moves all of them together.
    """
    x, half_range = rows.targets, 1 << (rows.bits - 1)
    base = (x.abs().amax(0) + 1e-12) / (half_range - 0.5)  # [N]
    largest = base.max()
    steps = (16 * (base / largest).sqrt()).round().clamp(1, 16)
    scale = (steps / 16).square() * largest
    factors = torch.linspace(0.7, 1.2, 97)
    errors = []
    for factor in factors:
        candidate = scale * factor
        miss = (x / candidate).round().clamp(-half_range, half_range - 1).mul_(candidate).sub_(x).abs_()
        errors.append((miss.sqrt() * miss * miss * miss).sum())
    best = factors[torch.stack(errors).argmin()]
    return (largest * best).half(), (steps - 1).to(torch.uint8)


def column_scales(rows: Rows) -> tuple[Tensor, Tensor]:
    """Our search, without what follows it in `quantize_matrix`."""
    return search_group(rows.targets, rows.bits, rows.pivots)[:2]


def tried_scales(rows: Rows) -> tuple[Tensor, Tensor]:
    """Our search, then codes up to two steps away from each column's tried by rounding the group."""
    maximum, codes = column_scales(rows)
    trials = torch.stack([(codes.int() + step).clamp(0, SCALES - 1) for step in (0, -1, 1, -2, 2)])
    losses = rows.round(scale_table(maximum).float()[trials])[2]
    best = losses.argmin(0)  # the first of equals
    return maximum, trials.gather(0, best[None])[0].to(torch.uint8)


def one_sweep(scales: Scales) -> Callable[..., SolvedLinear]:
    """A `quantize_matrix` that takes the scales of a rule and rounds each row once, to the nearest code."""

    def solve(weight: Tensor, factor: Factor, groups: GroupMap, *_: Any, **__: Any) -> SolvedLinear:
        weight = weight.float()
        k, n = weight.shape
        errors, values = torch.zeros(k, n), torch.empty(k, n)
        codes, loss = torch.empty(k, n, dtype=torch.uint8), torch.zeros(n, dtype=torch.float64)
        maxima, scale_codes, end = [], [], 0
        for group in groups:
            start, end = end, end + group.rows
            part = slice(start, end)
            targets = weight[part] + factor.unit_upper[:start, part].T @ errors[:start]
            upper = factor.unit_upper[part, part].contiguous()
            rows = Rows(weight[part], targets, group.bits, upper, factor.pivots[part].contiguous())
            maximum, chosen = scales(rows)
            rounded, values[part], missed = rows.round(scale_table(maximum).float()[chosen.long()])
            codes[part], errors[part] = rounded.to(torch.uint8), weight[part] - values[part]
            loss += missed.double()
            maxima.append(maximum)
            scale_codes.append(chosen)
        return SolvedLinear(codes, torch.stack(scale_codes), torch.stack(maxima), values.half(), loss)

    return solve


# Allocation


def block_of(name: str) -> int:
    """The block that a linear belongs to: the first number in its name."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"{name}: the name has no block number")
    return int(found[1])


def shared_by(key: Callable[[str, LinearMeasurement], Hashable]) -> Allocation:
    """An allocation in which all linears of equal key(name, entry) get the same bits per weight.

    Each takes its own best option of at most that many; groups of linears share the budget as single ones do
    in `allocate`, by their summed curves. What is left over then raises one group after the other. Where all
    of a group would go up at once, some of them, drawn at random, go first: no budget stays unspent.
    """

    def strategy(measurement: Measurement, target: float, head_bits: int) -> Strategy:
        linears = measurement.decoder
        groups: dict[Hashable, list[str]] = {}
        for name, linear in linears.items():
            groups.setdefault(key(name, linear), []).append(name)
        ladders = [_Ladder([linears[name] for name in names]) for names in groups.values()]
        curves: list[list[Option]] = []
        for ladder in ladders:
            points = list(zip(ladder.bits.tolist(), ladder.errors.tolist(), strict=True))
            curves.append([Option(*points[rung], str(rung)) for rung in lower_hull(points)])
        chosen = spend(curves, budget := int(target * measurement.decoder_weights))
        rungs = [int(curve[i].groups) for curve, i in zip(curves, chosen, strict=True)]
        left = budget - sum(int(ladder.bits[rung]) for ladder, rung in zip(ladders, rungs, strict=True))
        choices: dict[str, Option] = {}
        for names, ladder, rung in zip(groups.values(), ladders, rungs, strict=True):
            raised = int(np.searchsorted(ladder.bits, ladder.bits[rung] + left, "right")) - 1
            left -= int(ladder.bits[raised] - ladder.bits[rung])
            for name, option in zip(names, ladder.options(raised), strict=True):
                choices[name] = linears[name].options[option]
        return strategy_of(measurement, target, head_bits, choices)

    return strategy


class _Ladder:
    """Linears that rise together: each rung takes the one that is next in bits per weight to its next option.

    Attributes:
        bits: [rungs + 1] of all of them, rising.
        errors: [rungs + 1] of all of them.
    """

    def __init__(self, linears: Sequence[LinearMeasurement]) -> None:
        turns = np.random.default_rng(0).permutation(len(linears)).tolist()
        steps = []
        for member, (linear, turn) in enumerate(zip(linears, turns, strict=True)):
            for below, above in pairwise(linear.options):
                bits, error = above.bits - below.bits, above.error - below.error
                steps.append((above.bits / linear.weights, turn, member, bits, error))
        steps.sort()
        first = [linear.options[0] for linear in linears]
        self.bits = np.cumsum([sum(option.bits for option in first), *(step[3] for step in steps)])
        self.errors = np.cumsum([sum(option.error for option in first), *(step[4] for step in steps)])
        self._members = [step[2] for step in steps]
        self._count = len(linears)

    def options(self, rung: int) -> list[int]:
        """The option of each linear on a rung."""
        counts: list[int] = np.bincount(self._members[:rung], minlength=self._count).tolist()
        return counts


def relative_errors(measurement: Measurement, target: float, head_bits: int) -> Strategy:
    """The least sum of errors relative to each linear's own output, whatever they cost the model."""
    relative = {
        name: replace(
            linear,
            options=tuple(replace(o, error=o.error / (linear.energy or 1.0)) for o in linear.options),
        )
        for name, linear in measurement.decoder.items()
    }
    chosen = allocate(replace(measurement, linears=relative), target, head_bits).choices
    choices = {
        name: next(o for o in measurement.linears[name].options if o.groups == option.groups)
        for name, option in chosen.items()
    }
    return strategy_of(measurement, target, head_bits, choices)


def one_width(tables: Mapping[int, np.ndarray], n: int, prices: np.ndarray) -> list[GroupMap]:
    """In place of `water_fill`: all rows of a matrix at one width, in groups of one size."""
    k = 32 * tables[32].shape[1]
    return [uniform_groups(k, bits, rows) for bits in WIDTHS for rows in GROUP_ROWS if rows in tables]


# Hessians


def no_prior(weight: Tensor, moments: SplitMoments) -> Shrinkage:
    """Damping by selection tokens; experts rely on their own tokens alone."""
    return replace(choose_shrinkage(weight, SplitMoments(moments.fit, moments.selection)), prior=0.0)


def all_tokens(weight: Tensor, moments: SplitMoments) -> Shrinkage:
    """Damping by selection tokens; those of the others count for an expert as much as its own."""
    others = moments.prior.tokens if moments.prior else 0
    return replace(choose_shrinkage(weight, moments), prior=others / weight.shape[1])


def white(moments: Moments, prior: Moments | None, shrinkage: Shrinkage) -> Tensor:
    """A Hessian that knows nothing but the inputs' mean power, and that only for the allocation."""
    return torch.eye(len(moments.matrix)) * float(moments.matrix.diagonal().mean()) / (moments.weight or 1.0)


OURS = Variant("ours")


def _solver(name: str, scales: Scales) -> Variant:
    return Variant(name, patches={f"{SOLVE}.quantize_matrix": one_sweep(scales)})


def _effort(effort: str, **job: Any) -> Variant:
    return Variant(f"effort {effort}", Setting(effort, job={"effort": effort}), job={"effort": effort, **job})


def _damping(value: float) -> Variant:
    return Variant(
        f"damping {value} everywhere", Setting(f"damping-{value}", {f"{SHRINKAGE}.DAMPINGS": (value,)})
    )


def _shrinkage(name: str, rule: Callable[[Tensor, SplitMoments], Shrinkage]) -> Variant:
    return Variant(name, Setting(name.replace(" ", "-"), {f"{MEASURE}.choose_shrinkage": rule}))


def _tokens(count: int) -> Variant:
    return Variant(f"{count // 1024}k tokens", Setting(f"{count // 1024}k-tokens", tokens=count))


_WHITE = {
    f"{MEASURE}.choose_shrinkage": lambda weight, moments: Shrinkage(0.0),
    f"{MEASURE}.hessian": white,
    f"{SOLVE}.hessian": white,
}

STUDIES: Mapping[str, Sequence[Variant]] = {
    "sizes": [OURS],
    "scales": [
        _solver("exllamav2's scales", exllamav2_scales),
        _solver("search per column", column_scales),
        _solver("and trials with feedback", tried_scales),
        OURS,
    ],
    "allocation": [
        Variant("uniform", allocation=shared_by(lambda name, linear: 0)),
        Variant("one width per matrix", Setting("one-width", {f"{CURVE}.water_fill": one_width})),
        Variant("per role", allocation=shared_by(lambda name, linear: linear.role)),
        Variant("per block", allocation=shared_by(lambda name, linear: block_of(name))),
        Variant(
            "per block and role", allocation=shared_by(lambda name, linear: (block_of(name), linear.role))
        ),
        Variant("by relative error", allocation=relative_errors),
        OURS,
    ],
    "hessian": [
        Variant("no calibration", Setting("white", _WHITE), job={"repair": NO_REPAIR}),
        _damping(0.12),
        _damping(0.03),
        _shrinkage("no prior", no_prior),
        _shrinkage("all tokens for every expert", all_tokens),
        OURS,
    ],
    "calibration": [_tokens(8 * 1024), _tokens(32 * 1024), _tokens(128 * 1024)],
    "prediction": [
        Variant(f"part {i + 1} left out", Setting(f"left-out-{i}", left_out=i)) for i in range(HELD_OUT_EVERY)
    ],
    "repair": [Variant("without repair", job={"repair": NO_REPAIR}), OURS],
    "refit": [OURS, Variant("with refit", job={"refit": True})],
    "effort": [_effort("fast", repair=NO_REPAIR), OURS, _effort("best")],
}
