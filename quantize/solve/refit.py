"""The maxima of a linear's groups, fitted again once its codes are fixed.

Axes: K input channels, N output channels, G groups.

A weight Q of the format is linear in the maxima of its groups, Q = sum of f_g Q_g with f = 1. With the second
moments H of the inputs and C [N, K] those of target outputs and inputs, the factors that bring the outputs
nearest to the targets solve G equations,

    sum over h of <Q_g, Q_h H> f_h = <Q_g, C>.

H is not damped here, since G numbers are too few to learn the calibration text by heart. The target is
the output of the dense weight W, so C = W H; in linears that write into the residual stream (`repair`) it is
that and what the stream would still miss of the original's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, own_share
from dbrx_quant.quantize.solve.prepare import energy
from dbrx_quant.runtime.exl2.format import read_groups
from dbrx_quant.runtime.kernels.device import repeatable
from dbrx_quant.runtime.kernels.ops import dequantize_op
from dbrx_quant.runtime.kernels.stored import Stored

RIDGE = 1e-4  # towards factors of 1, in units of the groups' average energy
MOST = 2.0  # a maximum is at most doubled or halved


@dataclass(frozen=True)
class ResidualTarget:
    """What the residual stream would miss if a linear were added to it unquantized.

    Attributes:
        dense: [N, K] the linear's dense weight.
        cross: [N, K] sum over tokens of what is missing times the linear's inputs.
    """

    dense: Tensor
    cross: Tensor


def cross_moments(
    weight: Tensor,
    matrix: Tensor,
    target: ResidualTarget | None,
    moments: Moments,
    prior: Moments | None,
    shrinkage: Shrinkage,
) -> Tensor:
    """C of a linear, [N, K].

    Args:
        weight: [N, K], as it was quantized.
        matrix: [K, K], H from the moments, the prior and its weight in `shrinkage`.
        target: of a linear that writes into the residual stream; None: the weight's own output is the target.
        moments: of the linear's inputs.
        prior: of other tokens.
        shrinkage: the linear's.
    """
    if target is None or not moments.weight:
        return weight @ matrix
    share = own_share(moments, prior, shrinkage) / moments.weight
    return (target.dense @ matrix).add_(target.cross, alpha=share)


def refitted(tensors: Mapping[str, Tensor], matrix: Tensor, cross: Tensor) -> Tensor:
    """The new maxima of a linear, [G] float16.

    Args:
        tensors: of the linear as stored, keyed by suffix, on the host, as what is returned.
        matrix: [K, K] float32, H.
        cross: [N, K] float32, C.
    """
    weight, maxima = _weight(tensors, cross), tensors["q_scale_max"]
    groups = read_groups(tensors["q_groups"], tensors["q_weight"].shape[0], weight.shape[1])
    rows = torch.tensor([group.rows for group in groups])
    group = torch.arange(len(groups)).repeat_interleave(rows)[tensors["q_invperm"].long()]  # of each channel
    group = group.to(weight.device)

    def by_group(values: Tensor) -> Tensor:
        sums = torch.zeros(len(groups), *values.shape[1:], dtype=torch.float64, device=values.device)
        with repeatable():
            return sums.index_add_(0, group, values.double())

    aims = by_group(torch.einsum("nk,nk->k", weight, cross))  # without a third matrix of that size
    products = (weight.T @ weight).mul_(matrix)  # <Q_c, Q_d H> of channels c and d
    energies = by_group(_columns_by_group(products, group, len(groups)))
    left = aims - energies.sum(1)
    mean = float(energies.diagonal().mean())
    if mean <= 0:
        return maxima
    energies.diagonal().add_(RIDGE * mean)
    factors: Tensor = 1 + torch.linalg.solve(energies, left).cpu()
    return (maxima.double() * factors.clamp(1 / MOST, MOST)).half()


def _columns_by_group(values: Tensor, group: Tensor, count: int) -> Tensor:
    with repeatable():
        return values.new_zeros(len(values), count).index_add_(1, group, values)


def loss_of(tensors: Mapping[str, Tensor], weight: Tensor, matrix: Tensor) -> float:
    """tr(E^T H E) of a linear as stored, for its weight [N, K] and H [K, K]."""
    return energy(_weight(tensors, weight).sub_(weight), matrix)


def _weight(tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The float32 weight [N, K] where `like` [N, K] is; infinite maxima give an infinite loss: not taken."""
    weight: Tensor = dequantize_op(*Stored.of(tensors), len(like)).t().to(like.device).float()
    return weight
