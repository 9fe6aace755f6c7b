"""What a block's experts add to the stream: made one expert at a time, kept in 16 bits, added in their order.

The experts of a block get their inputs before any of them adds to the stream, so each can be made by itself.
What the stream will miss of the original's behind all of them is known before the first one is quantized:
it is compared with all their shares unquantized in it, and each expert repairs its part of that.

Axes: T tokens, D hidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Crew, Description, Result
from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.states import States, scratch
from dbrx_quant.calibration.blocks.walk import AddExperts, Span, Turn, Weights, token_spans, turns
from dbrx_quant.runtime.families.facts import ExpertsSpec
from dbrx_quant.runtime.kernels.device import download, upload


def shares_of(turn: Turn, weights: Weights, folder: Path) -> States:
    """What an expert adds to the stream, for its tokens in order, kept on the host.

    Args:
        turn: the expert's.
        weights: of the expert, [N, K].
        folder: for the file that they are in.
    """
    made, end = States.scratch(folder, (turn.count, turn.down.shape[1])), 0
    for index, share in turn.shares(weights):
        begin, end = end, end + len(index)
        made[begin:end] = download(share)
    return made


@dataclass(frozen=True)
class DenseShares:
    """A task: what an expert adds to the stream unquantized, the fields of `States` by name.

    Attributes:
        model: the source.
        block: whose experts they are.
        routing: of all tokens, with the experts' inputs.
        tokens: for how many of them, the first ones.
        folder: for files.
    """

    KIND: ClassVar[str] = "dense"

    model: StreamedModel
    block: int
    routing: Routing
    tokens: int
    folder: Path

    def do(self, turn: Turn) -> Result:
        """An expert's shares."""
        turn = turn.part(slice(self.tokens))
        if not turn.count:
            return States.scratch(self.folder, (0, turn.down.shape[1])).tensors
        return shares_of(turn, turn.narrowed(self.model), self.folder).tensors

    def products(self, turn: Turn) -> Sequence[Path]:
        """It leaves no files."""
        return ()

    def only_here(self, turn: Turn) -> bool:
        """Anybody can do it."""
        return False

    def described(self) -> Description:
        """What others make it of."""
        return Description(self.KIND, self.block, {"tokens": self.tokens})


def shared_out(crew: Crew, block: int, folder: Path) -> AddExperts:
    """A function that adds to a stream [T, D] what a crew makes of a block's unquantized experts."""

    def add(stream: Tensor, model: StreamedModel, experts: ExpertsSpec, routing: Routing) -> None:
        task = DenseShares(model, block, routing, len(stream), folder)
        for turn, result in crew.each(task, turns(routing, experts)):
            add_shares(stream, turn, States.of(result))

    return add


def add_shares(stream: Tensor, turn: Turn, shares: States, sign: int = 1) -> None:
    """Add an expert's shares of its first tokens, or of all, to states [T, D], or take them away."""
    index = turn.tokens.index[: len(shares)]
    for part in token_spans(len(index)):
        stream.index_add_(0, index[part], shares[part], alpha=sign)


@dataclass(frozen=True)
class Missing:
    """What the stream will miss of the original's behind a block's experts if these are not quantized.

    Attributes:
        states: [T, D] of the tokens to calibrate on.
        squares: [T] sum of the squared routing weights of a token's experts.
        shares: what each expert adds unquantized, by its number.
    """

    states: States
    squares: Tensor
    shares: dict[int, States] = field(default_factory=dict)

    @staticmethod
    def behind(
        dense: Iterable[tuple[Turn, Result]], weight: Tensor, stream: Tensor, goal: States, folder: Path
    ) -> "Missing":
        """What is missing at tokens with a goal.

        Args:
            dense: the experts' turns, and their unquantized shares of these tokens.
            weight: [T, A] routing weights.
            stream: [T, D] without any expert's share.
            goal: [T, D] the original's after the block.
            folder: for files.
        """
        gap, shares = scratch(folder, goal.shape), dict[int, States]()
        for part in token_spans(len(gap)):
            gap[part] = goal[part] - stream[part]
        for turn, result in dense:
            shares[turn.expert] = share = States.of(result)
            add_shares(gap, turn, share, -1)
        states = States.scratch(folder, gap.shape)
        for part in token_spans(len(gap)):
            states[part] = gap[part]
        return Missing(states, weight.float().square().sum(1), shares)

    def aim(self, expert: int, span: Span, share: Tensor) -> Tensor:
        """[T, D] what an expert is to repair: its part of what is missing, and what it has spoilt itself.

        A token's experts take part as w^2 / sum of w^2 of their routing weights w, as they would in the
        solution with the least change: what all of them add up to is what is missing.

        Args:
            expert: its number.
            span: some of its tokens.
            share: [T, D] what it adds with all its weights but the last quantized, on the expert's device.
        """
        squares, missing, dense = (
            upload(one, share.device)
            for one in (self.squares[span.index], self.states[span.index], self.shares[expert][span.part])
        )
        part = span.weight.square() / squares.clamp_min(torch.finfo(torch.float32).tiny)
        return part[:, None] * missing + (dense - share)
