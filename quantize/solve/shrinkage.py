"""How strongly a Hessian is regularised, chosen on selection tokens.

Axes: K input channels, N output channels, C sampled columns.
"""

import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize.solve.ldlq import quantize_matrix
from dbrx_quant.quantize.solve.prepare import SAMPLE_COLUMNS, Prepared, energy, prepare, spread_columns
from dbrx_quant.runtime.exl2.format import uniform_groups

DAMPINGS = (0.01, 0.03, 0.1, 0.2, 0.4)
PRIORS = (0.0, 0.1, 0.5)  # tokens of prior per input channel
UNCHOSEN = Shrinkage(0.2, 0.5)  # where there are too few selection tokens to choose by


def choose_shrinkage(weight: Tensor, moments: SplitMoments) -> Shrinkage:
    """The shrinkage with the least error on selection tokens, one dimension after the other.

    Args:
        weight: [N, K] float32, one of the linears that share these inputs.
        moments: of its inputs.
    """
    if not moments.can_choose:
        return UNCHOSEN
    scores: dict[Shrinkage, float] = {}

    def score(shrinkage: Shrinkage) -> float:
        if shrinkage not in scores:
            prepared = prepare(hessian(moments.fit, moments.prior, shrinkage))
            error, _ = trial_error(weight, prepared)
            scores[shrinkage] = energy(error.T, moments.selection.matrix)
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
    columns = spread_columns(weight.shape[0], SAMPLE_COLUMNS, weight.device)
    ordered = weight[columns].T[prepared.permutation].contiguous()
    groups = uniform_groups(ordered.shape[0], 3, 64)
    solved = quantize_matrix(ordered, prepared.factor, groups, effort="fast")
    error = torch.empty_like(ordered)
    error[prepared.permutation] = ordered - solved.dequantized.to(ordered.device).float()
    return error, solved.loss
