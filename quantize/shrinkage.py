"""How much a Hessian is regularised: the Hessian made of moments, and the choice on held-out tokens.

Axes: K input channels, N output channels, C sampled columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.calibration.hessian import Moments, SplitMoments
from dbrx_quant.quantize.ldlq import quantize_matrix
from dbrx_quant.quantize.prepare import SAMPLE_COLUMNS, Prepared, energy, prepare, spread_columns
from dbrx_quant.runtime.format import uniform_groups

DAMPINGS = (0.01, 0.03, 0.1, 0.2, 0.4)
PRIORS = (0.0, 0.1, 0.5)  # tokens of prior per input channel


@dataclass(frozen=True)
class Shrinkage:
    """How a Hessian is regularised.

    Attributes:
        damping: off-diagonal entries are scaled by 1 - damping. Ledoit & Wolf 2004 in spirit, towards the
            diagonal instead of a multiple of the identity so that the channels' own variances stay.
        prior: weight of the prior in tokens per input channel (experts with few tokens lean on tokens that
            were routed elsewhere).
    """

    damping: float
    prior: float = 0.0


UNCHOSEN = Shrinkage(0.2, 0.5)  # where too few tokens are held out to choose


def own_share(moments: Moments, prior: Moments | None, shrinkage: Shrinkage) -> float:
    """How much of a linear's Hessian comes from its own tokens, 0 to 1; the rest is the prior's."""
    own = moments.effective
    if prior is None or not prior.weight or (own and not shrinkage.prior):
        return 1.0
    pseudo = max(shrinkage.prior * moments.matrix.shape[0], 1.0)
    return own / (own + pseudo)


def hessian(moments: Moments, prior: Moments | None, shrinkage: Shrinkage) -> Tensor:
    """The regularised mean of x x^T, [K, K] float32, positive definite.

    An expert that saw no tokens at all gets the prior alone; without a prior, the identity.
    """
    k = moments.matrix.shape[0]
    result = moments.matrix / moments.weight if moments.weight else torch.zeros(k, k)
    own = own_share(moments, prior, shrinkage)
    if prior is not None and own < 1:
        result.mul_(own).add_(prior.matrix, alpha=(1 - own) / prior.weight)
    diagonal = result.diagonal().clone()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(k)
    result.mul_(1 - shrinkage.damping)
    # A channel that is (nearly) dead on the calibration text must still not be free to take any value.
    result.diagonal().copy_(diagonal.clamp_min(1e-6 * mean) + 1e-4 * mean)
    return result


def choose_shrinkage(weight: Tensor, moments: SplitMoments) -> Shrinkage:
    """The shrinkage with the least error on held-out tokens, one dimension after the other.

    Args:
        weight: [N, K] float32, one of the linears that share these inputs.
        moments: of its inputs, fit and held-out.
    """
    if not moments.can_choose:
        return UNCHOSEN
    scores: dict[Shrinkage, float] = {}

    def score(shrinkage: Shrinkage) -> float:
        if shrinkage not in scores:
            prepared = prepare(hessian(moments.fit, moments.prior, shrinkage))
            error, _ = trial_error(weight, prepared)
            scores[shrinkage] = energy(error.T, moments.held.matrix)
        return scores[shrinkage]

    has_prior = moments.prior is not None and moments.prior.tokens > 0
    best = min((Shrinkage(d, PRIORS[1] if has_prior else 0.0) for d in DAMPINGS), key=score)
    if has_prior:
        best = min((Shrinkage(best.damping, p) for p in PRIORS), key=score)
    return best


def trial_error(weight: Tensor, prepared: Prepared) -> tuple[Tensor, float]:
    """The error E [K, C] of a quick 3-bit solution of some columns, and its tr(E^T H E).

    Args:
        weight: [N, K] float32.
        prepared: its Hessian's factor.
    """
    columns = spread_columns(weight.shape[0], SAMPLE_COLUMNS)
    ordered = weight[columns].T[prepared.permutation].contiguous()
    groups = uniform_groups(ordered.shape[0], 3, 64)
    solved = quantize_matrix(ordered, prepared.factor, groups, effort="fast")
    error = torch.empty_like(ordered)
    error[prepared.permutation] = ordered - solved.dequantized.float()
    return error, solved.loss
