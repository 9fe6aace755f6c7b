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

from dbrx_quant.calibration.streamed import StreamedModel

TOKENS_AT_ONCE = 512  # logits of so many tokens are held at a time


@dataclass
class GradientSum:
    """Sum over tokens of a linear's squared output gradients, per output channel: [N] float64."""

    columns: Tensor

    @staticmethod
    def zero(n: int) -> "GradientSum":
        """No tokens seen yet."""
        return GradientSum(torch.zeros(n, dtype=torch.float64))

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
            return torch.ones(len(self.columns))
        return (0.5 + 0.5 * self.columns / mean).float()


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label [T, 1] for each row of probabilities [T, N]; takes a fraction of torch.multinomial's time."""
    cumulative = probabilities.cumsum(-1)
    drawn = torch.rand(len(cumulative), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).clamp_(max=cumulative.shape[1] - 1)


def head_gradients(
    model: StreamedModel, states: Tensor, gradients: Tensor, head: Tensor, seed: int
) -> GradientSum:
    """Gradients of the log-likelihood of sampled labels with respect to the last block's output.

    Args:
        model: the source model.
        states: [T, D] output of the last block.
        gradients: [T, D], filled.
        head: [vocabulary, D] float32, the head's weight.
        seed: of the labels' draw.

    Returns:
        The squared gradients with respect to the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    total = GradientSum.zero(head.shape[0])
    for start in range(0, len(states), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        x = states[part].clone().requires_grad_()
        with torch.enable_grad():
            hidden = model.final_norm(x)
        gradient = (hidden.detach() @ head.T).softmax(-1)
        labels = draw_labels(gradient, generator)
        gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
        gradient.neg_()  # d log p(label) / d logits = onehot - p
        total.add(gradient)
        hidden.backward(gradient @ head)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        gradients[part] = x.grad
    return total
