"""Which tokens an expert learns from: those routed to it, and some that were not, as a prior."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import Routing

PRIOR_TOKENS = 2048  # tokens routed elsewhere that are run through an expert at most


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert.

    Attributes:
        index: [T_e] positions among all tokens.
        slot: [T_e] which of the token's A choices this expert is.
        weight: [T_e] routing weights.
        others: positions of tokens routed elsewhere, evenly spread.
    """

    index: Tensor
    slot: Tensor
    weight: Tensor
    others: Tensor


def tokens_of(routing: Routing, expert: int) -> ExpertTokens:
    """The tokens that `routing` sends to an expert, and a spread of those that it doesn't."""
    chosen = routing.index == expert
    index, slot = chosen.nonzero(as_tuple=True)
    others = (~chosen.any(1)).nonzero()[:, 0]
    if len(others) > PRIOR_TOKENS:
        others = others[torch.linspace(0, len(others) - 1, PRIOR_TOKENS).long()]
    return ExpertTokens(index, slot, routing.weight[index, slot].float(), others)


@dataclass(frozen=True)
class ExpertCoverage:
    """How much of the calibration an expert saw.

    Attributes:
        tokens: that were routed to it.
        share: of all choices.
        mean_weight: the mean of its routing weights.
    """

    tokens: int
    share: float
    mean_weight: float


def coverage(routing: Routing, experts: int) -> tuple[ExpertCoverage, ...]:
    """The coverage of each expert."""
    found = []
    for expert in range(experts):
        mine = routing.index == expert
        count = int(mine.sum())
        mean = float(routing.weight[mine].float().mean()) if count else 0.0
        found.append(ExpertCoverage(count, count / routing.index.numel(), mean))
    return tuple(found)
