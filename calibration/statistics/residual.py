"""What the residual stream misses of the original's, summed up against a linear's inputs.

Axes: T tokens, K input channels, N output channels.
"""

from torch import Tensor

from dbrx_quant.calibration.statistics.moments import SplitMoments, is_selection
from dbrx_quant.runtime.kernels.float_matmul import rounded_products


class ResidualMoments:
    """What the stream misses, summed up with a linear's inputs beside the inputs' own second moments.

    Attributes:
        inputs: moments of x x^T, summed up by the caller.
        fit: [N, K] sum of r x^T over the tokens that are fitted.
        selection: the same over selection tokens.
    """

    def __init__(self, inputs: SplitMoments, k: int, n: int) -> None:
        like = inputs.fit.upper
        self.inputs, self.fit, self.selection = inputs, like.new_zeros(n, k), like.new_zeros(n, k)

    def add(self, x: Tensor, missing: Tensor, token_rows: Tensor, routing: Tensor | None = None) -> None:
        """Add tokens that are in `inputs` too.

        Args:
            x: [T, K] inputs.
            missing: [T, N] r.
            token_rows: [T] the calibration row of each token.
            routing: [T] weights with which the linear's output enters the stream, the roots of those in
                `inputs`; None: 1 each.
        """
        scaled = missing if routing is None else missing * routing[:, None]
        selection = is_selection(token_rows).to(x.device)
        for total, mask in ((self.fit, ~selection), (self.selection, selection)):
            with rounded_products(x.device):
                total.addmm_(scaled[mask].T, x[mask])
