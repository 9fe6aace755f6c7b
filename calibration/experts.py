"""Which tokens an expert learns from: those routed to it, and some that were not, as a prior."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.streamed import Routing

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


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name, transformers' own."""
    from transformers.activations import ACT2FN

    function: Any = ACT2FN[name]
    return lambda x: function(x)


def expert_inner(x: Tensor, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate x) * up x, the input of an expert's down projection, for tokens [T, D] and weights [N, K]."""
    return act(x @ gate.T) * (x @ up.T)


def expert_output(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], act: Callable[[Tensor], Tensor]
) -> Tensor:
    """down(act(gate x) * up x) for tokens [T, D] and weights [N, K] of gate, up and down."""
    gate, up, down = weights
    return expert_inner(x, gate, up, act) @ down.T


def coverage(routing: Routing, experts: int) -> list[dict[str, float]]:
    """Per expert: tokens, share of all choices, and the mean routing weight."""
    rows = []
    for expert in range(experts):
        mine = routing.index == expert
        count = int(mine.sum())
        mean = float(routing.weight[mine].float().mean()) if count else 0.0
        rows.append({"tokens": count, "share": count / routing.index.numel(), "mean_weight": mean})
    return rows
