"""Quantization of one linear against its Hessian, row by row with error feedback.

Axes: K input channels in packed order, N output channels, G groups. For H = U diag(pivots) U^T with U unit
upper triangular and E = W - Q,

    trace(E^T H E) = sum over c of pivot_c * |E_c + sum over j < c of U[j, c] E_j|^2,

so row c, taken in order 0 to K-1, is best rounded to the grid value nearest to its target
W_c + sum over j < c of U[j, c] E_j, and pivot_c weighs its rounding error. This is GPTQ (Frantar et al.
2022) in the form that Chee et al. 2023 (QuIP, section 3) call LDLQ and Chen et al. 2025 (arXiv 2507.18553)
identify with Babai's nearest plane algorithm: it needs the factor of H itself and no inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dbrx_quant.quantize.solve import native
from dbrx_quant.quantize.solve.grid import (
    HALF_MAX,
    SCALES,
    Backend,
    check_finite,
    first_least,
    inverse_scale,
    round_half,
    scale_table,
    search_group_torch,
)
from dbrx_quant.runtime.exl2.format import GroupMap, check_groups
from dbrx_quant.runtime.kernels.device import download
from dbrx_quant.runtime.kernels.float_matmul import rounded_products

_PANEL_COLUMNS = 128  # of the factorization
_BLOCK_ROWS = 256  # rows between two matrix products of the feedback, more where groups ask for it
_PATHS = 8  # ways to round a group that are followed at once
_CODE_STEPS = (0, -1, 1, -2, 2)  # scale codes tried around the one that the search chose
_PATH_STEPS = (0, -1, 1)  # and around that one with paths, at effort "best"

Effort = Literal["fast", "default", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)  # in the order of the native library's numbers


@dataclass(frozen=True)
class Factor:
    """H = U diag(pivots) U^T.

    Attributes:
        unit_upper: U, [K, K] float32, ones on the diagonal, zeros below it.
        pivots: [K] float32, positive: the variance of each input given the ones after it.
    """

    unit_upper: Tensor
    pivots: Tensor


@dataclass(frozen=True)
class SolvedLinear:
    """A quantized linear, rows in packed order.

    Attributes:
        codes: [K, N] uint8.
        scale_codes: [G, N] uint8, 0 to 15.
        scale_max: [G] float16.
        dequantized: [K, N] float16, exactly what the packed file decodes to; [0, N] if the weight was to be
            overwritten.
        loss_per_column: [N] float64, the diagonal of E^T H E.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_max: Tensor
    dequantized: Tensor
    loss_per_column: Tensor

    @property
    def loss(self) -> float:
        """trace(E^T H E)."""
        return float(self.loss_per_column.sum())


def factorize(hessian: Tensor, overwrite: bool = False) -> Factor:
    """Factor of a Hessian whose rows are in packed order.

    Args:
        hessian: [K, K] float32, symmetric (the lower triangle is not read).
        overwrite: use the Hessian's memory for U; saves K^2 floats.

    Raises:
        ValueError: a pivot is not positive; names its row.

    A Cholesky factorization H = R R^T with R upper triangular, from the last row to the first, in
    left-looking panels: nearly all work is one matrix product a panel. It takes two thirds of LAPACK's time
    with both axes flipped (docs/experiments.md).
    """
    k = hessian.shape[0]
    if hessian.shape != (k, k):
        raise ValueError(f"a Hessian must be square, got {tuple(hessian.shape)}")
    upper = hessian if overwrite else hessian.clone()
    for end in range(k, 0, -_PANEL_COLUMNS):
        start = max(0, end - _PANEL_COLUMNS)
        panel = upper[:end, start:end]
        if end < k:
            panel.addmm_(upper[:end, end:], upper[start:end, end:].T, alpha=-1)
        corner = panel[start:]
        flipped, failed = torch.linalg.cholesky_ex(corner.double().flip(0, 1).mT)
        if failed:
            row = end - int(failed)
            raise ValueError(
                f"the pivot of row {row} of the Hessian is not positive; "
                "it needs more damping or more calibration tokens"
            )
        root = flipped.flip(0, 1)
        corner.copy_(root)
        if start:
            identity = torch.eye(end - start, dtype=root.dtype, device=root.device)
            inverse = torch.linalg.solve_triangular(root, identity, upper=True)
            panel[:start] = panel[:start] @ inverse.mT.float()
    roots = upper.diagonal().clone()
    upper.div_(roots).triu_()
    return Factor(upper, roots.square())


def _blocks(groups: GroupMap) -> Iterator[tuple[int, int]]:
    """Ranges of whole groups with about _BLOCK_ROWS rows each."""
    first = rows = 0
    for index, group in enumerate(groups):
        if rows and rows + group.rows > _BLOCK_ROWS:
            yield first, index
            first, rows = index, 0
        rows += group.rows
    yield first, len(groups)


def quantize_matrix(
    weight: Tensor,
    factor: Factor,
    groups: GroupMap,
    column_weights: Tensor | None = None,
    backend: Backend = "native",
    effort: Effort = "default",
    overwrite: bool = False,
) -> SolvedLinear:
    """Round a weight to the EXL2 grid with the least trace(E^T H E) that one pass finds.

    Args:
        weight: [K, N] float32, rows in packed order.
        factor: of the Hessian in the same order.
        groups: widths and rows of the groups, in order.
        column_weights: [N] float32, how much each output channel counts in the choice of the groups' maxima;
            None means equally.
        backend: "native" or "torch"; equal results.
        effort: how many of the steps below are taken.
        overwrite: use the weight's memory for the errors, and keep no dequantized weights; saves 6 bytes a
            weight, which is gigabytes for a head.

    Weight and factor are on one device, which makes the products of the feedback; codes and scales are
    searched on the host, where the solution stays.

    Raises:
        ValueError: shapes disagree, the groups are not legal for K rows, or a weight is not finite.

    Each group goes through three steps. Its scales are searched on its rows' targets, without regard to the
    feedback within the group (`grid`). Then the scale codes up to two steps from each column's best are
    tried by rounding the group with each. At last the codes are searched with the M-algorithm: several ways
    to round the rows so far are followed at once instead of the nearest value alone, and the one that has
    the least loss at the end of the group stays. Effort "fast" takes only the first step and rounds every
    target to its nearest value; "best" tries one scale code more or less again before the third step, by the
    loss that paths reach.

    On trained weights the second and third step each take 4 to 11 % off the held-out loss; on weights drawn
    at random, both together take 1 %. On one core (AVX-512, groups of 32) the steps take 40 ns a weight, 10
    without the third, and the matrix products 65 at K = 6144. What was tried beside them is in
    docs/experiments.md.
    """
    k, n = weight.shape
    check_groups(groups, k)
    check_finite(weight, "weight")
    if factor.unit_upper.shape != (k, k):
        raise ValueError(f"weight has {k} rows, the factor is for {factor.unit_upper.shape[0]}")
    if column_weights is not None and column_weights.shape != (n,):
        raise ValueError(f"weight has {n} columns, got column_weights {tuple(column_weights.shape)}")
    # Rows hold their errors once they are rounded, their weights until then.
    errors = weight.float().contiguous()
    if not overwrite and errors.data_ptr() == weight.data_ptr():
        errors = weight.clone()
    blocks = [
        (first, last, sum(group.rows for group in groups[first:last])) for first, last in _blocks(groups)
    ]
    targets_of = torch.empty(max(rows for *_, rows in blocks), n, device=errors.device)
    pivots = factor.pivots.cpu()
    column_weights = None if column_weights is None else column_weights.cpu()
    solved = SolvedLinear(
        codes=torch.empty(k, n, dtype=torch.uint8),
        scale_codes=torch.empty(len(groups), n, dtype=torch.uint8),
        scale_max=torch.empty(len(groups), dtype=torch.float16),
        dequantized=torch.empty(0 if overwrite else k, n, dtype=torch.float16),
        loss_per_column=torch.zeros(n, dtype=torch.float64),
    )
    solve = native.solve_block if backend == "native" else _solve_block_torch
    end = 0
    unkept = torch.empty(len(targets_of) if overwrite else 0, n, dtype=torch.float16)
    for first, last, rows in blocks:
        start, end = end, end + rows
        targets = targets_of[:rows]
        with rounded_products():  # on CPUs alone: it changes the loss by 0.0 ± 0.1 % (docs/experiments.md)
            torch.addmm(
                errors[start:end], factor.unit_upper[:start, start:end].T, errors[:start], out=targets
            )
        near = download(targets)  # targets, and then errors
        solve(
            download(errors[start:end]),
            factor.unit_upper[start:end, start:end].T.contiguous().cpu(),
            pivots[start:end].contiguous(),
            column_weights,
            [group.bits for group in groups[first:last]],
            [group.rows for group in groups[first:last]],
            EFFORTS.index(effort),
            near,
            solved.codes[start:end],
            solved.scale_codes[first:last],
            solved.scale_max[first:last],
            unkept[:rows] if overwrite else solved.dequantized[start:end],
            solved.loss_per_column,
        )
        errors[start:end].copy_(near, non_blocking=True)  # the next targets wait for it, the host need not
    return solved


def _solve_block_torch(
    weight: Tensor,
    coefficients: Tensor,
    pivots: Tensor,
    column_weights: Tensor | None,
    bits: list[int],
    rows: list[int],
    effort: int,
    errors: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    dequantized: Tensor,
    loss: Tensor,
) -> None:
    """`native.solve_block` in plain torch, operation by operation: the oracle of the native solver."""
    start = 0
    block_loss = torch.zeros_like(loss)
    for g, (width, count) in enumerate(zip(bits, rows, strict=True)):
        end = start + count
        targets = errors[start:end].clone()
        for r in range(count):
            for j in range(start):
                targets[r] = targets[r] + errors[j] * coefficients[start + r, j]

        group = (targets, weight[start:end], coefficients[start:end, start:end], pivots[start:end], width)
        scale_max[g], chosen, _, _ = search_group_torch(targets, width, pivots[start:end], column_weights)
        table = scale_table(scale_max[g]).float()
        if EFFORTS[effort] == "fast":
            chosen = chosen.int()
            rounded, values, group_loss = _sweep(*group, table[chosen])
        else:
            trials = _near(chosen, _CODE_STEPS)
            chosen, _ = first_least(_sweep(*group, table[trials])[2], trials)
            if EFFORTS[effort] == "best":
                trials = _near(chosen, _PATH_STEPS)
                losses = torch.stack([_search_paths(*group, table[trial])[2] for trial in trials])
                chosen, _ = first_least(losses, trials)
            rounded, values, group_loss = _search_paths(*group, table[chosen])

        scale_codes[g] = chosen.to(torch.uint8)
        errors[start:end] = weight[start:end] - values
        codes[start:end] = (rounded + (1 << (width - 1))).to(torch.uint8)
        dequantized[start:end] = values.half()
        block_loss += group_loss.double()
        start = end
    loss += block_loss


def _near(codes: Tensor, steps: tuple[int, ...]) -> Tensor:
    return torch.stack([codes.int() + step for step in steps]).clamp(0, SCALES - 1)


def _codes_within_reach(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest signed code of the width whose value a half can hold, for each of the scales."""
    half_range = float(1 << (bits - 1))
    reach = (HALF_MAX / scale.clamp(min=2.0**-24)).clamp(max=1024).floor()
    return (-reach).clamp(min=-half_range), reach.clamp(max=half_range - 1)


def _sweep(
    targets: Tensor, weight: Tensor, coefficients: Tensor, pivots: Tensor, bits: int, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [rows, N], each rounded to its nearest value on grids of scales [..., N], with feedback.

    Returns:
        Codes and values [rows, ..., N], and the loss [..., N].
    """
    inverse = inverse_scale(scale)
    low, high = _codes_within_reach(scale, bits)
    loss = torch.zeros_like(scale)
    codes: list[Tensor] = []
    values: list[Tensor] = []
    errors: list[Tensor] = []
    for r in range(len(targets)):
        target = targets[r].expand_as(scale)
        for j in range(r):
            target = target + errors[j] * coefficients[r, j]
        codes.append(torch.round(torch.clamp(target * inverse, low, high)))
        values.append(round_half(codes[r] * scale))
        miss = target - values[r]
        loss = loss + (miss * miss) * pivots[r]
        errors.append(weight[r] - values[r])
    return torch.stack(codes), torch.stack(values), loss


def _search_paths(
    targets: Tensor, weight: Tensor, coefficients: Tensor, pivots: Tensor, bits: int, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and values [rows, N] and loss [N] of the best of _PATHS ways to round targets [rows, N].

    A path is a choice of codes for the rows so far. Each row continues each path with the nearest and the
    second nearest code; of these the _PATHS with the least loss live on.
    """
    rows, n = targets.shape
    inverse = inverse_scale(scale)
    low, high = _codes_within_reach(scale, bits)
    pending = targets[:, None].repeat(1, _PATHS, 1)  # [rows, paths, N]
    total = torch.full((_PATHS, n), torch.inf)
    total[0] = 0  # at first there is one path
    codes = torch.empty(rows, _PATHS, n)
    parents = torch.empty(rows, _PATHS, n, dtype=torch.int64)
    for r in range(rows):
        target = pending[r]
        exact = target * inverse
        nearest = torch.round(torch.clamp(exact, low, high)) + 0.0  # no -0
        second = nearest + torch.where(exact > nearest, 1.0, -1.0)
        possible = (second >= low) & (second <= high) & (scale > 0)
        continued = torch.cat([nearest, torch.where(possible, second, nearest)])
        values = round_half(continued * scale)
        misses = target.repeat(2, 1) - values
        totals = total.repeat(2, 1) + (misses * misses) * pivots[r]
        totals[_PATHS:][~possible] = torch.inf

        # The last four bits of a loss give way to its number: no two keys are equal.
        numbers = torch.arange(2 * _PATHS, dtype=torch.int32)[:, None]
        best = ((totals.view(torch.int32) & ~15) | numbers).sort(0).values[:_PATHS].long() & 15
        total, codes[r], parents[r] = totals.gather(0, best), continued.gather(0, best), best % _PATHS
        error = weight[r] - values.gather(0, best)
        later = pending[r + 1 :].gather(1, parents[r].expand(rows - r - 1, -1, -1))
        pending[r + 1 :] = later + error * coefficients[r + 1 :, r, None, None]

    path = torch.zeros(1, n, dtype=torch.int64)
    chosen = torch.empty(rows, n)
    for r in range(rows - 1, -1, -1):
        chosen[r], path = codes[r].gather(0, path)[0], parents[r].gather(0, path)
    return chosen, round_half(chosen * scale), total[0]
