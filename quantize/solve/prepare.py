"""A Hessian prepared for solving: channels in order, its factor, and the weight of errors under it.

Axes: K input channels, N output channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.quantize.solve.ldlq import Factor, factorize
from dbrx_quant.runtime.kernels.device import CPU

_ROWS = 128  # ordered at once, so that they stay in the cache in between
SAMPLE_COLUMNS = 128  # columns that stand for all where an estimate is enough


@dataclass(frozen=True)
class Prepared:
    """A Hessian ready for solving: the order of the input channels, and the factor in that order."""

    permutation: Tensor
    factor: Factor


def prepare(matrix: Tensor) -> Prepared:
    """Order channels by falling variance (act-order) and factorise; takes over the Hessian's memory."""
    permutation = torch.argsort(matrix.diagonal(), descending=True, stable=True)
    return Prepared(permutation, factorize(_reordered(matrix, permutation), overwrite=True))


def _reordered(matrix: Tensor, permutation: Tensor) -> Tensor:
    ordered = torch.empty_like(matrix)
    for begin in range(0, len(matrix), _ROWS):
        rows = matrix[permutation[begin : begin + _ROWS]]
        torch.gather(rows, 1, permutation.expand(len(rows), -1), out=ordered[begin : begin + _ROWS])
    return ordered


def spread_columns(n: int, count: int, device: torch.device = CPU) -> Tensor:
    """`count` columns spread evenly over N, all of them where there are no more."""
    return (torch.arange(n) if n <= count else torch.linspace(0, n - 1, count).long()).to(device)


def energy(weight: Tensor, matrix: Tensor) -> float:
    """tr(W^T H W) for W [N, K] and H [K, K]."""
    return product_sum(weight @ matrix, weight)


def product_sum(a: Tensor, b: Tensor) -> float:
    """The sum over all elements of a b, both [N, K]: rows in float32, then in float64."""
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def sampled_energy(weight: Tensor, matrix: Tensor) -> float:
    """tr(W^T H W) for W [N, K] and H [K, K], from at most SAMPLE_COLUMNS of its columns."""
    columns = spread_columns(weight.shape[0], SAMPLE_COLUMNS, weight.device)
    return energy(weight[columns], matrix) * weight.shape[0] / len(columns)
