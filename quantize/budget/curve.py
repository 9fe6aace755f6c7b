"""The error-versus-bits curve of one linear, from one factorisation of its Hessian.

Errors are of tr(E^T H E) with H the mean of x x^T and columns weighted by their share of the gradient; what
turns them into nats is the linear's own sum of squared gradients (`calibration.statistics.fisher`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.quantize.budget.groups import GROUP_ROWS, lower_hull, predicted_error, price_range, water_fill
from dbrx_quant.quantize.measurement import Option
from dbrx_quant.quantize.solve.grid import error_table
from dbrx_quant.quantize.solve.ldlq import Effort, quantize_matrix
from dbrx_quant.quantize.solve.prepare import SAMPLE_COLUMNS, Prepared, spread_columns
from dbrx_quant.quantize.solve.shrinkage import trial_error
from dbrx_quant.runtime.exl2.format import WIDTHS, padded_columns, storage_bits, uniform_groups
from dbrx_quant.runtime.exl2.group_text import render_groups

PRICES = 48  # prices of a bit that the curve is drawn at
FEEDBACK_ROWS = 64  # rows of the groups of the real solutions that calibrate the table
FEEDBACK_WIDTHS = (2, 4, 6, 8)  # widths that are solved for real; those between lie between


@dataclass(frozen=True)
class Curve:
    """Options of one linear by rising bits and falling error.

    Attributes:
        options: with errors of the output, not yet in nats.
        feedback: per width of WIDTHS, error of a real solution over the table's prediction, included in the
            errors.
        energy: tr(W^T H W), the error of dropping the linear altogether.
    """

    options: tuple[Option, ...]
    feedback: tuple[float, ...]
    energy: float


def held_out_ratio(weight: Tensor, prepared: Prepared, held_out: HeldOutInputs) -> float:
    """Squared output error on held-out tokens, relative to what the Hessian predicts.

    Args:
        weight: [N, K] float32, one of the linears that share these inputs.
        prepared: their Hessian's factor.
        held_out: their inputs; where there are none, the Hessian is believed.
    """
    if not held_out.tokens:
        return 1.0
    error, expected = trial_error(weight, prepared)
    return held_out.error(error) / expected if expected > 0 else 1.0


def draw(
    weight: Tensor,
    prepared: Prepared,
    column_weights: Tensor,
    energy: float,
    feedback: Sequence[float],
    bias: bool = False,
) -> Curve:
    """The curve of one linear.

    Args:
        weight: [N, K] float32.
        prepared: its Hessian's factor.
        column_weights: [N] float32, mean 1.
        energy: tr(W^T H W).
        feedback: from `feedback_factors`, of this linear or one like it.
        bias: whether a bias is stored along with it, and paid for.
    """
    n, k = weight.shape
    stored = padded_columns(n)
    columns = spread_columns(n, SAMPLE_COLUMNS, weight.device)
    share = n / len(columns)
    ordered = weight[columns].T[prepared.permutation].contiguous()
    importance = column_weights[columns].contiguous()
    scale = share * np.array(feedback)[:, None]
    tables = {
        rows: scale * error_table(ordered, prepared.factor.pivots, importance, WIDTHS, rows).numpy()
        for rows in GROUP_ROWS
        if rows <= k
    }
    maps = list(dict.fromkeys(water_fill(tables, stored, price_range(tables, stored, PRICES))))
    points = [(storage_bits(groups, (k, stored), bias), predicted_error(tables, groups)) for groups in maps]
    hull = lower_hull(points)
    options = tuple(Option(*points[i], render_groups(maps[i])) for i in hull)
    return Curve(options, tuple(feedback), energy)


def feedback_factors(
    weight: Tensor, prepared: Prepared, column_weights: Tensor, effort: Effort = "default"
) -> tuple[float, ...]:
    """Per width of WIDTHS, the error of real solutions over the sum of the table's.

    Args:
        weight: [N, K] float32; some of its columns are solved.
        prepared: its Hessian's factor.
        column_weights: [N] float32.
        effort: of the real solutions.

    Feedback moves the targets. Two bits then clip more than the table knows (factors up to 1.6 were seen on
    trained weights), many bits round a little better. Linears with the same inputs and experts of one role
    have the same factors within 2 % (standard deviation, trained weights, up to 6 bits).
    """
    columns = spread_columns(weight.shape[0], SAMPLE_COLUMNS, weight.device)
    trial = weight[columns].T[prepared.permutation].contiguous()
    weights, rows = column_weights[columns].contiguous(), min(FEEDBACK_ROWS, trial.shape[0])
    predicted = error_table(trial, prepared.factor.pivots, weights, FEEDBACK_WIDTHS, rows).sum(1)
    factors = []
    for width, expected in zip(FEEDBACK_WIDTHS, predicted.tolist(), strict=True):
        groups = uniform_groups(trial.shape[0], width, rows)
        solved = quantize_matrix(trial, prepared.factor, groups, weights, effort=effort)
        actual = float((solved.loss_per_column * weights.cpu().double()).sum())
        factors.append(actual / expected if expected > 0 else 1.0)
    return tuple(np.interp(WIDTHS, FEEDBACK_WIDTHS, factors).tolist())
