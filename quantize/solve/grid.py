"""The grid of values that EXL2 can store, and the search for the scales of a group of rows.

Axes: K input channels in packed order, N output channels. Values of group g, column n:

    (code - 2^(bits-1)) * scale,   scale = half(s^2 * half(scale_max / 256)),   s = scale code + 1 in 1..16

The search minimizes the squared error weighted by the rows' pivots (their conditional variances, see `ldlq`)
and is made of three steps. (A) Each column alone: which of a range of scales, from "clips much" to "clips
nothing", has the least error. (B) The group's maximum: some candidates around the largest of these, each
judged by the errors that the columns have on the stored scales next to their own best one. (C) Each column
takes the best of four stored scales. exllamav2 instead searches one clip factor for the whole group and
rounds each column's maximum to the nearest stored scale.

`backend="native"` is csrc/cpu/solver; `backend="torch"` spells out the same operations in the same order and
gives the same bits, slowly.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.quantize.solve import native
from dbrx_quant.runtime.exl2.format import WIDTHS

Backend = Literal["native", "torch"]

SCALES = 16
TILE = 64  # columns whose errors are added up one by one before the sums of tiles are
NOMINALS = 12
MAXIMA = 16
HALF_MAX = 65504.0
LOWEST_FACTOR = {2: 0.20, 3: 0.25, 4: 0.30, 5: 0.40, 6: 0.50, 8: 0.75}
HIGHEST_FACTOR = 1.10


def scale_table(scale_max: Tensor) -> Tensor:
    """The sixteen scales that scale codes 0 to 15 stand for.

    Args:
        scale_max: [...] float16, group maxima as stored.

    Returns:
        [..., 16] float16, in the two half roundings of the format.
    """
    multiplier = (scale_max.float() / 256).half().float()
    squares = torch.arange(1, SCALES + 1, dtype=torch.float32) ** 2
    return (multiplier[..., None] * squares).half()


def search_group(
    x: Tensor,
    bits: int,
    row_weights: Tensor,
    column_weights: Tensor | None = None,
    backend: Backend = "native",
) -> tuple[Tensor, Tensor, float]:
    """Scales of one group with the least weighted squared rounding error.

    Args:
        x: [rows, N] float32, finite.
        bits: width of the codes.
        row_weights: [rows] float32, positive.
        column_weights: [N] float32, not negative; None means 1 everywhere. They count in the choice of the
            group's maximum and in the error, not in a column's own choice.
        backend: "native" or "torch"; equal results.

    Returns:
        scale_max (float16 scalar), scale_codes [N] uint8, and the error: sum over columns of column weight
        times sum over rows of row weight times squared distance to the nearest grid value. A group of zeros
        has scale_max 0.
    """
    check_finite(x, "x")
    _check_widths([bits])
    arguments = (x.contiguous(), bits, row_weights.contiguous(), _contiguous(column_weights))
    if backend == "native":
        return native.search_group(*arguments)
    scale_max, scale_codes, _, error = search_group_torch(*arguments)
    return scale_max, scale_codes, error


def error_table(
    weight: Tensor,
    pivots: Tensor,
    column_weights: Tensor | None,
    bits: Sequence[int],
    group_rows: int,
    backend: Backend = "native",
) -> Tensor:
    """Rounding error of every run of `group_rows` rows at every width, the input of bit allocation.

    Args:
        weight: [K, N] float32, rows in packed order, on any device, as all. N may be a sample of the columns.
        pivots: [K] float32, the rows' weights.
        column_weights: [N] float32 or None.
        bits: the widths.
        group_rows: rows of a group; the last group is shorter where K asks for it.
        backend: "native" or "torch"; equal results.

    Returns:
        [len(bits), ceil(K / group_rows)] float64, each the error of `search_group`. Their sum predicts the
        loss of `quantize_matrix`: error feedback moves what is rounded, but hardly its distance to the grid.
    """
    check_finite(weight, "weight")
    _check_widths(bits)
    if group_rows <= 0:
        raise ValueError(f"group_rows is {group_rows}, must be positive")
    if pivots.shape != weight.shape[:1]:
        raise ValueError(f"{weight.shape[0]} rows need one pivot each, got {tuple(pivots.shape)}")
    weight, pivots = weight.cpu().contiguous(), pivots.cpu().contiguous()
    column_weights = None if column_weights is None else column_weights.cpu().contiguous()
    if backend == "native":
        return native.error_table(weight, pivots, column_weights, bits, group_rows)
    starts = range(0, len(weight), group_rows)
    groups = [(weight[start : start + group_rows], pivots[start : start + group_rows]) for start in starts]
    errors = [[search_group_torch(x, width, w, column_weights)[3] for x, w in groups] for width in bits]
    return torch.tensor(errors, dtype=torch.float64)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError naming the first element of [rows, columns] that is inf or NaN."""
    # The extremes are finite exactly when all elements are, and need no second tensor of the same size.
    low, high = tensor.aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    row, column = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    value = tensor[row, column].item()
    raise ValueError(f"{name}[{row}, {column}] is {value}; a quantized weight must be finite")


def _check_widths(bits: Sequence[int]) -> None:
    for width in bits:
        if width not in WIDTHS:
            raise ValueError(f"{width} bits; the format has {', '.join(map(str, WIDTHS))}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def inverse_scale(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for scales too small for any half, so that everything rounds to code 0."""
    usable = scale >= 2.0**-26
    return torch.where(usable, 1 / torch.where(usable, scale, torch.ones(())), torch.zeros(()))


def round_half(x: Tensor) -> Tensor:
    """Nearest half values, as float32."""
    return x.half().float()


def _grid_errors(x: Tensor, bits: int, row_weights: Tensor, scale: Tensor) -> Tensor:
    """Weighted squared errors [..., N] of x [rows, N] on grids of scales [..., N], rows added one by one."""
    half_range = float(1 << (bits - 1))
    inverse = inverse_scale(scale)
    total = torch.zeros_like(scale)
    for value, weight in zip(x, row_weights, strict=True):
        code = torch.round(torch.clamp(value * inverse, -half_range, half_range - 1))
        miss = value - code * scale
        total = total + (miss * miss) * weight
    return total


def first_least(errors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's candidate [C, N] of least error [C, N], the first of equals, and that error."""
    best, least = candidates[0], errors[0]
    for candidate, error in zip(candidates[1:], errors[1:], strict=True):
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best, least


def _sum_columns(errors: Tensor, column_weights: Tensor) -> np.ndarray:
    """Sums over the last axis in float64: one by one within each tile, then over the tiles."""
    products = errors.double() * column_weights.double()
    products = torch.nn.functional.pad(products, (0, -products.shape[-1] % TILE))
    tiles = products.reshape(*products.shape[:-1], -1, TILE).numpy()
    sums: np.ndarray = tiles.cumsum(-1)[..., -1].cumsum(-1)[..., -1]
    return sums


def _nominal_scales(x: Tensor, bits: int, row_weights: Tensor) -> Tensor:
    """Step A: each column's best scale [N] if any scale could be stored; 0 for a column of zeros."""
    half_range = float(1 << (bits - 1))
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    # The scale at which the extremes are half a step outside of the outermost codes.
    base = torch.maximum(high / (half_range - 0.5), -low / (half_range + 0.5))
    lowest = LOWEST_FACTOR[bits]
    factors = [lowest * (HIGHEST_FACTOR / lowest) ** (i / (NOMINALS - 1)) for i in range(NOMINALS)]
    scale = (base * torch.tensor(factors, dtype=torch.float32)[:, None]).clamp(max=HALF_MAX)
    return first_least(_grid_errors(x, bits, row_weights, scale), scale)[0]


def _candidate_maxima(largest: float) -> Tensor:
    """Candidates for a group's maximum [16], half values in float32, given the largest nominal scale.

    Where half(maximum / 256) would be a small subnormal, a few percent more or less change nothing, and the
    multiples of the smallest half are tried instead.
    """
    if largest < 2.0**-12:
        return torch.arange(1, MAXIMA + 1, dtype=torch.float32) * 2.0**-16
    factors = torch.tensor([0.70 + 0.45 * i / (MAXIMA - 1) for i in range(MAXIMA)], dtype=torch.float32)
    return round_half((largest * factors).clamp(max=HALF_MAX))


def _code_below(nominal: Tensor, multiplier: Tensor) -> Tensor:
    """The largest s in 1..16 whose stored scale does not exceed the nominal scale; 1 if none."""
    divisor = torch.where(multiplier == 0, torch.ones(()), multiplier)
    root = torch.sqrt(nominal / divisor).clamp(1, SCALES).floor()
    return torch.where(multiplier == 0, torch.ones(()), root)


def search_group_torch(
    x: Tensor, bits: int, row_weights: Tensor, column_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """`search_group` in plain torch: scale_max, scale_codes [N], scales [N] (float32 of halves), error."""
    n = x.shape[1]
    if column_weights is None:
        column_weights = torch.ones(n)
    nominal = _nominal_scales(x, bits, row_weights)
    maximum = multiplier = torch.zeros(())
    if nominal.max() > 0:
        maxima = _candidate_maxima(nominal.max().item())
        multipliers = round_half(maxima / 256)[:, None]
        below = _code_below(nominal, multipliers)
        scales = torch.stack([below, (below + 1).clamp(max=SCALES)])
        errors = _grid_errors(x, bits, row_weights, round_half(scales * scales * multipliers))
        best = int(np.argmin(_sum_columns(torch.minimum(errors[0], errors[1]), column_weights)))
        maximum, multiplier = maxima[best], multipliers[best, 0]

    s = _code_below(nominal, multiplier) + torch.arange(-1, 3, dtype=torch.float32)[:, None]
    s = s.clamp(1, SCALES)
    best_s, least = first_least(_grid_errors(x, bits, row_weights, round_half(s * s * multiplier)), s)
    best_s = torch.where(
        nominal == 0, torch.ones(()), best_s
    )  # all zero: any scale will do, and it gets code 0
    scales = round_half(best_s * best_s * multiplier)
    error = float(_sum_columns(least, column_weights))
    return maximum.half(), (best_s - 1).to(torch.uint8), scales, error
