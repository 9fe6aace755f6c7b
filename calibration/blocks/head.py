"""A model's head on streamed states: gradients of drawn labels, and how far two models are apart."""

from collections.abc import Callable

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import States
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.runtime.evaluation.scores import Scores, evaluate

TOKENS_AT_ONCE = 512  # tokens whose logits are in memory at a time


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label [T, 1] for each row of probabilities [T, N]; takes a fraction of torch.multinomial's time."""
    cumulative = probabilities.cumsum(-1)
    drawn = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True).clamp_(max=cumulative.shape[1] - 1)


def head_gradients(
    model: StreamedModel, states: States, gradients: Tensor, head: Tensor, seed: int
) -> GradientSum:
    """Gradients of the log-likelihood of sampled labels with respect to the last block's output.

    Args:
        model: the source model.
        states: [T, D] output of the last block, read to the model's device.
        gradients: [T, D] on the host, filled.
        head: [vocabulary, D] float32, the head's weight, on the device.
        seed: of the labels' draw.

    Returns:
        The squared gradients with respect to the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    total = GradientSum.zero(head.shape[0], head.device)
    for start in range(0, len(states), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        x = states[part].requires_grad_()
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


def distance(
    model: StreamedModel,
    states: States,
    original: States,
    weight: Tensor,
    dense: Tensor,
    rows: Tensor,
    through: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """How far a changed model is from its original, from the states that both end with.

    Args:
        model: the original.
        states: [R, L, D] after the changed model's last block, read to the model's device.
        original: [R, L, D] after the original's.
        weight: [vocabulary, D] of the changed model's head.
        dense: [vocabulary, D] of the original's; both in float32 on the device.
        rows: [R, L] token ids.
        through: what happens to the changed model's logits on their way.
    """
    ends, goals = iter(states), iter(original)

    def changed(_: Tensor) -> Tensor:
        logits = model.final_norm(next(ends)) @ weight.T
        return through(logits) if through else logits

    return evaluate(changed, lambda _: model.final_norm(next(goals)) @ dense.T, rows)
