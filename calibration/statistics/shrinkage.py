"""The Hessian of a linear's output error, made of moments and regularised; H = E[w x x^T] over its inputs x.

Axes: K input channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.moments import Moments, mirror


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


def own_share(moments: Moments, prior: Moments | None, shrinkage: Shrinkage) -> float:
    """How much of a linear's Hessian comes from its own tokens, 0 to 1; the rest is the prior's."""
    own = moments.effective
    if prior is None or not prior.weight or (own and not shrinkage.prior):
        return 1.0
    pseudo = max(shrinkage.prior * len(moments.upper), 1.0)
    return own / (own + pseudo)


def hessian(moments: Moments, prior: Moments | None, shrinkage: Shrinkage) -> Tensor:
    """The regularised mean of x x^T, [K, K] float32, positive definite.

    An expert that saw no tokens at all gets the prior alone; without a prior, the identity.
    """
    k = len(moments.upper)
    result = moments.upper / moments.weight if moments.weight else torch.zeros_like(moments.upper)
    own = own_share(moments, prior, shrinkage)
    if prior is not None and own < 1:
        result.mul_(own).add_(prior.upper, alpha=(1 - own) / prior.weight)
    diagonal = result.diagonal().clone()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(k, device=result.device)
    mirror(result.mul_(1 - shrinkage.damping))
    # A channel that is (nearly) dead on the calibration text must still not be free to take any value.
    result.diagonal().copy_(diagonal.clamp_min(1e-6 * mean) + 1e-4 * mean)
    return result
