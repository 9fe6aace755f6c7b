"""Second moments of a linear's inputs: what the Hessian of its output error is made of.

The Hessian of a linear's squared output error is H = E[w x x^T] over its input tokens x. For an expert w is
the square of the routing weight, so that tr(E^T H E) is the expert's share of the block's output error; then
frequency, affinity and error are all inside one number. One calibration row in eight is a selection row: its
tokens choose how much the Hessian is shrunk, the others are fitted, and until then the two are kept apart.
(Held-out rows are something else: nothing is chosen on them, and they are in no moments.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels.device import CPU
from dbrx_quant.runtime.kernels.float_matmul import rounded_products

SELECTION_EVERY = 8  # one calibration row in so many is a selection row
MIN_SELECTION_TOKENS = 64  # with fewer of them, or fewer to fit on, nothing can be chosen
_COLUMNS = 1024  # whose products with each other and those behind them are made at once
_TILE = 256  # mirrored at once: 1024 take two and a half times as long


def is_selection(token_rows: Tensor) -> Tensor:
    """Which tokens are in selection rows, from the calibration row each belongs to; bool, same shape."""
    return token_rows % SELECTION_EVERY == SELECTION_EVERY - 1


class Moments:
    """Weighted sums over tokens: of x x^T, of the weights, of their squares.

    Args:
        matrix: [K, K] float32, sum of w x x^T; taken over.
        weight: sum of w.
        squares: sum of w^2.
        tokens: number of tokens.
        mirrored: whether the matrix holds anything left of its diagonal.
    """

    def __init__(
        self,
        matrix: Tensor,
        weight: float = 0.0,
        squares: float = 0.0,
        tokens: int = 0,
        mirrored: bool = True,
    ) -> None:
        self._sum, self._mirrored = matrix, mirrored
        self.weight, self.squares, self.tokens = weight, squares, tokens

    @staticmethod
    def zero(k: int, device: torch.device = CPU) -> "Moments":
        """No tokens seen yet; those that come are on the device."""
        return Moments(torch.zeros(k, k, device=device))

    @property
    def matrix(self) -> Tensor:
        """[K, K] float32, sum of w x x^T."""
        if not self._mirrored:
            mirror(self._sum)
            self._mirrored = True
        return self._sum

    @property
    def upper(self) -> Tensor:
        """The same, valid at the diagonal and right of it; `mirror` completes it, or what is made of it."""
        return self._sum

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x [T, K] with weights [T] (1 each if None)."""
        if not x.shape[0]:
            return
        x = x.float()
        if weights is None:
            self.weight += x.shape[0]
            self.squares += x.shape[0]
        else:
            x = x * weights.sqrt()[:, None]  # on both sides, so that rounding leaves it a square
            self.weight += float(weights.sum(dtype=torch.float64))
            self.squares += float(weights.double().square().sum())
        with rounded_products(x.device):
            for start in range(0, x.shape[1], _COLUMNS):
                end = start + _COLUMNS
                self._sum[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        self._mirrored = x.shape[1] <= _COLUMNS
        self.tokens += x.shape[0]

    def check(self, name: str) -> None:
        """Raise ValueError naming the linear if a moment is not finite."""
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            channel = int((~torch.isfinite(self._sum.diagonal())).nonzero()[0])
            raise ValueError(
                f"{name}: its calibration inputs contain NaN or infinity (input channel {channel}); "
                "the source model overflows on this text in float32, or its weights are damaged"
            )

    @property
    def prior(self) -> None:
        """They have none; `SplitMoments` may."""
        return None

    def joined(self) -> "Moments":
        """These: they are not split."""
        return self

    @property
    def effective(self) -> float:
        """Tokens that would carry the same information at equal weight (Kish)."""
        return self.weight**2 / self.squares if self.squares else 0.0


def effective(weights: Tensor) -> float:
    """The same of tokens with weights [T] float64 that are not summed up yet."""
    squares = float(weights.square().sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


@dataclass
class SplitMoments:
    """Moments of fitted and selection tokens apart, and of tokens that serve as a prior (experts only)."""

    fit: Moments
    selection: Moments
    prior: Moments | None = None

    @staticmethod
    def zero(k: int, prior: bool = False, device: torch.device = CPU) -> "SplitMoments":
        """No tokens seen yet; those that come are on the device."""
        fit, selection = Moments.zero(k, device), Moments.zero(k, device)
        return SplitMoments(fit, selection, Moments.zero(k, device) if prior else None)

    def add(self, x: Tensor, token_rows: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x [T, K] of the given calibration rows [T] with weights [T]."""
        selection = is_selection(token_rows).to(x.device)
        for part, mask in ((self.fit, ~selection), (self.selection, selection)):
            part.add(x[mask], None if weights is None else weights[mask])

    def add_prior(self, x: Tensor) -> None:
        """Add tokens x [T, K] of the prior."""
        if self.prior is None:
            raise ValueError("these moments have no prior; make them with prior=True")
        self.prior.add(x)

    @property
    def can_choose(self) -> bool:
        """Whether there are enough tokens to fit on, and enough others to judge the fit by."""
        return min(self.fit.tokens, self.selection.tokens) >= MIN_SELECTION_TOKENS

    def check(self, name: str) -> None:
        """Raise ValueError naming the linear if a moment is not finite."""
        for part in (self.fit, self.selection, *([self.prior] if self.prior else [])):
            part.check(name)

    def joined(self) -> Moments:
        """Fitted and selection tokens together (takes over the fit moments' memory)."""
        return Moments(
            self.fit.upper.add_(self.selection.upper),
            self.fit.weight + self.selection.weight,
            self.fit.squares + self.selection.squares,
            self.fit.tokens + self.selection.tokens,
            mirrored=False,
        )


def mirror(matrix: Tensor) -> None:
    """Complete a symmetric matrix [K, K] of which the part right of the diagonal has been summed up."""
    for begin in range(0, len(matrix), _COLUMNS):
        end = begin + _COLUMNS
        for row in range(begin, min(end, len(matrix)), _TILE):
            rows = slice(row, min(row + _TILE, end))
            for column in range(end, len(matrix), _TILE):
                columns = slice(column, column + _TILE)
                matrix[columns, rows] = matrix[rows, columns].T.contiguous()
