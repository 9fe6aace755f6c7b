"""Weights of linears that write into the residual stream, changed so as to repair what the stream has lost.

Axes: T tokens, K input channels, N output channels. When an attention output or down projection W is about
to be quantized, the linears before it already are: its inputs x and the stream it adds to differ from the
original's. With r [T, N] what the stream would still miss of the original's if W were added unquantized,

    W' = W + strength * (sum of r x^T) (sum of x x^T + ridge)^-1

is the weight that comes nearest to the original's stream with the inputs there are (ridge regression), and
takes the place of W in the quantization. GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (Zhang et al.
2025, arXiv 2505.11695) aim every linear at its own output in the original; here the two linears that can
reach the stream aim at the stream, and the others stay as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.quantize.solve.ldlq import Factor, factorize
from dbrx_quant.quantize.solve.prepare import energy, product_sum, spread_columns
from dbrx_quant.quantize.solve.refit import ResidualTarget

_JUDGED_OUTPUTS = 512  # outputs that the strength is chosen on, evenly spread


@dataclass(frozen=True)
class Repair:
    """How weights are repaired.

    Attributes:
        ridge: added to each input channel's mean square, in units of the channels' average.
    """

    ridge: float = 1.0

    @property
    def needs_original(self) -> bool:
        """Whether the original's stream runs beside the model's."""
        return True

    def aim(
        self, dense: list[Tensor], residual: ResidualMoments | None, refit: bool
    ) -> tuple[list[Tensor], ResidualTarget | None]:
        """What linears are quantized from, [N, K]; uses up the residual.

        Args:
            dense: their weights in the source.
            residual: what the stream misses behind a single one that writes into it; None: nothing changes.
            refit: whether its scales will be fitted, to what is returned with it.
        """
        if residual is None:
            return dense, None
        weight = repaired(dense[0], residual, self)
        return [weight], ResidualTarget(dense[0], residual.fit.add_(residual.selection)) if refit else None


@dataclass(frozen=True)
class NoRepair(Repair):
    """No weight is repaired, and the original need not run."""

    @property
    def needs_original(self) -> bool:
        """It does not."""
        return False


DEFAULT_REPAIR = Repair()
NO_REPAIR = NoRepair()


def repaired(weight: Tensor, moments: ResidualMoments, repair: Repair) -> Tensor:
    """The repaired weight [N, K].

    A change of some outputs is computed from the fitted tokens, and the strength, from 0 to 1, is what takes
    most off the squared error of the selection tokens; then all tokens together give the change that is made.
    """
    fit, selection = moments.inputs.fit, moments.inputs.selection
    if not moments.inputs.can_choose or not fit.upper.any():  # then nothing is repaired
        return weight
    outputs = spread_columns(len(weight), _JUDGED_OUTPUTS, weight.device)
    change = _least_squares(moments.fit[outputs], fit.upper, fit.weight, repair)
    gain, cost = product_sum(change, moments.selection[outputs]), energy(change, selection.matrix)
    if gain <= 0 or cost <= 0:
        return weight
    everything = fit.upper + selection.upper
    weight_sum = fit.weight + selection.weight
    change = _least_squares(moments.fit + moments.selection, everything, weight_sum, repair)
    return change.mul_(min(1.0, gain / cost)).add_(weight)


def _least_squares(cross: Tensor, matrix: Tensor, count: float, repair: Repair) -> Tensor:
    """The change that is best by these sums; of the matrix nothing left of the diagonal is read."""
    ridged = matrix / count
    ridged.diagonal().add_(repair.ridge * float(ridged.diagonal().mean()))
    return solve(factorize(ridged, overwrite=True), cross / count)


def solve(factor: Factor, right: Tensor) -> Tensor:
    """Right H^-1 for right [N, K] and H = U diag(pivots) U^T [K, K]."""
    half = torch.linalg.solve_triangular(factor.unit_upper, right.T, upper=True, unitriangular=True)
    half /= factor.pivots[:, None]
    solved: Tensor = torch.linalg.solve_triangular(factor.unit_upper.T, half, upper=False, unitriangular=True)
    return solved.T.contiguous()
