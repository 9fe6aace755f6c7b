"""The residual stream that a block's experts add to: as it is, or held against the original's (`repair`).

Axes: T tokens, K input channels, N output channels.
"""

from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.hessian import SplitMoments
from dbrx_quant.calibration.streamed import Routing, StreamedModel
from dbrx_quant.calibration.walk import DenseShares, Span, Turn
from dbrx_quant.quantize.refit import ResidualTarget
from dbrx_quant.quantize.repair import Repair, RepairMoments, repaired
from dbrx_quant.runtime.families.facts import ExpertsSpec


class Aim:
    """What a linear that writes into the stream is quantized towards: its own dense weight [N, K]."""

    def __init__(self, dense: Tensor) -> None:
        self._dense = dense

    def add(self, span: Span, x: Tensor, token_rows: Tensor) -> None:
        """Look at some tokens with the linear's inputs x [T, K] and their calibration rows [T]."""

    def finish(self, refit: bool) -> tuple[Tensor, ResidualTarget | None]:
        """The weight to quantize; where it is repaired and `refit` is on, what its scales are fitted to."""
        return self._dense, None


class RepairedAim(Aim):
    """A dense weight changed so as to repair what the stream has lost.

    Args:
        dense: [N, K] the weight.
        inputs: moments of its inputs, summed up by the caller.
        goal: [T, N] the stream as the original has it.
        stream: [T, N] the stream before the linear adds to it.
        repair: how.
    """

    def __init__(
        self, dense: Tensor, inputs: SplitMoments, goal: Tensor, stream: Tensor, repair: Repair
    ) -> None:
        super().__init__(dense)
        self._moments = RepairMoments(inputs, *reversed(dense.shape))
        self._goal, self._stream, self._repair = goal, stream, repair

    def add(self, span: Span, x: Tensor, token_rows: Tensor) -> None:
        """Sum up what the stream would miss of some tokens."""
        share = span.weight[:, None] * (x @ self._dense.T)
        missing = self._goal[span.index] - self._stream[span.index] - share
        self._moments.add(x, missing, token_rows, span.weight)

    def finish(self, refit: bool) -> tuple[Tensor, ResidualTarget | None]:
        """The repaired weight, and what its scales are fitted to if `refit` is on."""
        return finish_repair(self._dense, self._moments, self._repair, refit)


def finish_repair(
    dense: Tensor, moments: RepairMoments, repair: Repair, refit: bool
) -> tuple[Tensor, ResidualTarget | None]:
    """A repaired weight [N, K], and what its scales are fitted to if `refit` is on; uses up the moments."""
    weight = repaired(dense, moments, repair)
    return weight, ResidualTarget(dense, moments.fit.add_(moments.held)) if refit else None


class Stream:
    """The stream of the model that is being quantized.

    Attributes:
        states: [T, D], what the experts add to.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def take_turn(self, turn: Turn) -> None:
        """An expert's turn to add to the stream begins; experts come in order."""

    def aim(self, dense: Tensor, inputs: SplitMoments) -> Aim:
        """What the down projection of that expert is quantized towards."""
        return Aim(dense)

    def close(self) -> None:
        """All experts have added theirs."""


class RepairedStream(Stream):
    """The stream with all experts' unquantized shares in it, replaced by quantized ones in their turns.

    Args:
        states: [T, D], changed in place.
        goal: [T, D], the original's after the block.
        shares: path for the shares.
        model: for the dense weights.
        experts: of the block.
        routing: of all tokens.
        repair: how down projections are repaired.
    """

    def __init__(
        self,
        states: Tensor,
        goal: Tensor,
        shares: Path,
        model: StreamedModel,
        experts: ExpertsSpec,
        routing: Routing,
        repair: Repair,
    ) -> None:
        super().__init__(states)
        self._goal, self._repair = goal, repair
        self._dense = DenseShares(shares, model, experts, routing, states)

    def take_turn(self, turn: Turn) -> None:
        """Take the expert's unquantized share out of the stream."""
        self._dense.take_away(turn)

    def aim(self, dense: Tensor, inputs: SplitMoments) -> Aim:
        """The down projection makes good what the experts before it have spoilt."""
        return RepairedAim(dense, inputs, self._goal, self.states, self._repair)

    def close(self) -> None:
        """Remove the shares."""
        self._dense.close()
