"""The residual stream that a block's experts add to: as it is, or held against the original's.

Axes: T tokens, D hidden, K input channels, N output channels.
"""

from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.walk import DenseShares, Span, Turn
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.runtime.families.facts import ExpertsSpec


class Stream:
    """The stream as it is.

    Attributes:
        states: [T, D], what the experts add to.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def take_turn(self, turn: Turn) -> None:
        """An expert's turn to add to the stream begins; experts come in order."""

    def residual(self, dense: Tensor, inputs: SplitMoments) -> ResidualMoments:
        """For what the stream misses at an expert's turn; nothing is summed up here.

        Args:
            dense: [N, K] of its down projection.
            inputs: moments of that projection's inputs, summed up by the caller.
        """
        return ResidualMoments(inputs, 0, 0)

    def miss(self, moments: ResidualMoments, dense: Tensor, span: Span, x: Tensor, rows: Tensor) -> None:
        """Sum up what the stream would miss of some tokens if the projection were added unquantized.

        Args:
            moments: from `residual`.
            dense: [N, K] of the down projection.
            span: the tokens.
            x: [T, K] their inputs of the projection.
            rows: [T] their calibration rows.
        """

    def close(self) -> None:
        """All experts have added theirs."""


class ComparedStream(Stream):
    """The stream beside the original's: all experts' unquantized shares are in it until their turns come.

    Args:
        states: [T, D], changed in place.
        goal: [T, D], the original's after the block.
        shares: path for the shares.
        model: for the dense weights.
        experts: of the block.
        routing: of all tokens.
    """

    def __init__(
        self,
        states: Tensor,
        goal: Tensor,
        shares: Path,
        model: StreamedModel,
        experts: ExpertsSpec,
        routing: Routing,
    ) -> None:
        super().__init__(states)
        self._goal = goal
        self._dense = DenseShares(shares, model, experts, routing, states)

    def take_turn(self, turn: Turn) -> None:
        """Take the expert's unquantized share out of the stream."""
        self._dense.take_away(turn)

    def residual(self, dense: Tensor, inputs: SplitMoments) -> ResidualMoments:
        """For what the stream misses at an expert's turn: what those before it have spoilt."""
        return ResidualMoments(inputs, *reversed(dense.shape))

    def miss(self, moments: ResidualMoments, dense: Tensor, span: Span, x: Tensor, rows: Tensor) -> None:
        """Sum it up."""
        share = span.weight[:, None] * (x @ dense.T)
        missing = self._goal[span.index] - self.states[span.index] - share
        moments.add(x, missing, rows, span.weight)

    def close(self) -> None:
        """Remove the shares."""
        self._dense.close()
