"""What an error in a linear's output costs the whole model: squared gradients of the log-likelihood.

For labels drawn from the model itself, KL(original || perturbed) is, to second order, half the mean square
of <gradient, perturbation> (the Fisher information; Martens 2020, section 5). With perturbations e_t of a
linear's outputs taken as uncorrelated with the gradients g_t and spread evenly over the N channels,

    KL per token = sum over t of |g_t|^2 |e_t|^2 / (2 N T).

One backward pass prices every linear of the model, experts included, in nats per squared output error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels.device import CPU


@dataclass
class GradientSum:
    """Sum over tokens of a linear's squared output gradients, per output channel: [N] float64."""

    columns: Tensor

    @staticmethod
    def zero(n: int, device: torch.device = CPU) -> "GradientSum":
        """No tokens seen yet; the gradients that come are on the device."""
        return GradientSum(torch.zeros(n, dtype=torch.float64, device=device))

    def add(self, gradient: Tensor) -> None:
        """Add gradients [..., N]."""
        flat = gradient.reshape(-1, gradient.shape[-1])
        self.columns += flat.square().sum(0, dtype=torch.float64)

    @property
    def total(self) -> float:
        """Sum over tokens of the mean over channels."""
        return float(self.columns.mean())

    def column_weights(self) -> Tensor:
        """How much each channel counts, mean 1: [N] float32. Half of it is even: the sum is an estimate."""
        mean = float(self.columns.mean())
        if mean <= 0:
            return torch.ones(len(self.columns), device=self.columns.device)
        return (0.5 + 0.5 * self.columns / mean).float()
