"""Inputs of a linear on held-out rows, on which nothing is chosen: what an error costs there."""

import torch
from torch import Tensor

HELD_OUT_TOKENS = 2048  # as many tokens' inputs are kept, unsummed


class HeldOutInputs:
    """Inputs of one linear, or of several that share theirs, with the weights of their tokens."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x [T, K] with weights [T] (1 each if None)."""
        self._inputs.append(x.float())
        self._weights.append(torch.ones(len(x), device=x.device) if weights is None else weights)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(x) for x in self._inputs)

    def error(self, error: Tensor) -> float:
        """The weighted mean over the tokens of |x E|^2, for an error E [K, C] of the weight."""
        pairs = list(zip(self._inputs, self._weights, strict=True))
        total = sum(float(w @ (x @ error).square().sum(-1)) for x, w in pairs)
        return total / sum(float(w.sum()) for _, w in pairs)
