"""The experts of a block measured: each takes its tokens forward and back, and its linears get their curves.

Axes: T tokens, D hidden, A experts per token, N and K output and input channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Description, Result, Signals
from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.stages import WeightOf
from dbrx_quant.calibration.blocks.states import States, scratch
from dbrx_quant.calibration.blocks.walk import Span, Turn, Weights, token_spans, turns
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments, effective, is_selection
from dbrx_quant.quantize.budget.measure import Likeness, Measurer, step
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.kernels.device import download
from dbrx_quant.runtime.kernels.float_matmul import narrowed, product


@dataclass(frozen=True)
class MeasuredExperts:
    """A task: the entries of an expert's linears, and gradients with respect to what it got.

    Attributes:
        model: the source.
        block: whose experts they are.
        experts: all of them.
        routing: of all tokens, with the experts' inputs: those that go backward, others to calibrate on,
            held-out ones.
        length: tokens of a row.
        seen: how many tokens are calibrated on.
        effective: how many of them each expert has, as `effective_tokens` counts them.
        upstream: [T, D] gradients with respect to the block's output, of those that go backward.
        upstream_file: where these are from.
        measurer: of linears.
        folder: for files while it runs.
        signals: from the tasks of other experts, and to them.
    """

    KIND: ClassVar[str] = "measure"

    model: StreamedModel
    block: int
    experts: ExpertsSpec
    routing: Routing
    length: int
    seen: int
    effective: Mapping[int, float]
    upstream: States
    upstream_file: Path
    measurer: Measurer
    folder: Path
    signals: Signals

    def do(self, turn: Turn) -> Result:
        """Measure an expert.

        Returns:
            For its tokens that go backward, in order: gradients with respect to its inputs, the fields of
            `States` by name, and to its routing weights, "weight" [T].
        """
        seen, held_out = turn.part(slice(self.seen)), turn.part(slice(self.seen, None))
        dense = seen.dense(self.model)
        gate, up, _ = weights = narrowed(dense[0]), narrowed(dense[1]), narrowed(dense[2])
        sums = _Sums.zero(seen, torch.arange(len(self.routing.index)) // self.length)
        backward = int((seen.tokens.index < len(self.upstream)).sum())
        x_gradients = States.scratch(self.folder, (backward, seen.gate.shape[0]))
        weight_gradients = torch.zeros(backward)
        for span in seen.spans(end=backward):
            x_gradient, weight_gradient = self._back(seen, span, weights, sums)
            x_gradients[span.part], weight_gradients[span.part] = download(x_gradient), weight_gradient.cpu()
        for span in seen.spans(begin=backward):
            sums.add(span, seen.inner(span.x, gate, up))
        for x in seen.others():
            sums.inputs.add_prior(x)
            sums.inner.add_prior(seen.inner(x, gate, up))
        shown, shown_inner, span = HeldOutInputs(), HeldOutInputs(), held_out.whole()
        shown.add(span.x, span.weight.square())
        shown_inner.add(seen.inner(span.x, gate, up), span.weight.square())
        weight_of = dict(zip(seen.linears, dense, strict=True)).__getitem__
        self._measure([seen.gate, seen.up], turn, sums.inputs, shown, sums, weight_of)
        self._measure([seen.down], turn, sums.inner, shown_inner, sums, weight_of)
        return {**x_gradients.tensors, "weight": weight_gradients}

    def products(self, turn: Turn) -> Sequence[Path]:
        """The entries."""
        return [self.measurer.entry(spec.name) for spec in turn.linears]

    def only_here(self, turn: Turn) -> bool:
        """Anybody can do it."""
        return False

    def described(self) -> Description:
        """What others make it of."""
        facts = {
            "length": self.length,
            "seen": self.seen,
            "effort": self.measurer.effort,
            "scale": self.measurer.scale,
        }
        entries = [self.measurer.entry(spec.name) for linears in self.experts.linears for spec in linears]
        files = [self.upstream_file, *(path for path in entries if path.exists())]
        paths = {"upstream": self.upstream_file, "entries": self.measurer.folder}
        return Description(self.KIND, self.block, facts, files=files, paths=paths)

    def _measure(
        self,
        specs: Sequence[LinearSpec],
        turn: Turn,
        moments: SplitMoments,
        held_out: HeldOutInputs,
        sums: "_Sums",
        weight_of: WeightOf,
    ) -> None:
        like = self._likeness(turn, specs[0])
        for name in {like.shrinkage, like.feedback} - {None}:
            self.signals.wait_for(self.measurer.entry(str(name)))
        self.measurer.measure(specs, moments, held_out, sums.gradients, weight_of, like)
        for spec in specs:
            self.signals.announce(self.measurer.entry(spec.name))

    def _likeness(self, turn: Turn, spec: LinearSpec) -> Likeness:
        """The first expert of the block tells feedback, the first one with as many tokens shrinkage."""

        def alike(expert: int) -> int:
            return step(self.effective[expert], spec.shape[0])

        first = next(iter(self.effective))
        like = next(expert for expert in self.effective if alike(expert) == alike(turn.expert))
        names = {
            one.expert: one.name
            for linears in self.experts.linears
            for one in linears
            if one.role == spec.role
        }
        return Likeness(*(None if expert == turn.expert else names[expert] for expert in (like, first)))

    def _back(self, turn: Turn, span: Span, weights: Weights, sums: "_Sums") -> tuple[Tensor, Tensor]:
        """Take some tokens through an expert and back: gradients of its inputs and of its routing weights."""
        gate, up, down = weights
        x = span.x.requires_grad_()
        with torch.enable_grad():
            g, u = product(x, gate), product(x, up)
            h = turn.activate(g) * u
        above = self.upstream[span.index]
        y_gradient = span.weight[:, None] * above
        y = product(h.detach(), down)
        weight_gradient = (y * above).sum(-1)
        g_gradient, u_gradient, x_gradient = torch.autograd.grad(h, (g, u, x), product(y_gradient, down.T))
        for spec, gradient in zip(turn.linears, (g_gradient, u_gradient, y_gradient), strict=True):
            sums.gradients[spec.name].add(gradient)
        sums.add(span, h)
        return x_gradient, weight_gradient


def effective_tokens(routing: Routing, experts: ExpertsSpec, length: int) -> dict[int, float]:
    """The effective tokens of each expert of a block, fitted and selection ones, by the experts' numbers.

    Args:
        routing: of the tokens to calibrate on.
        experts: of the block.
        length: tokens of a row.
    """
    found = {}
    for turn in turns(routing, experts):
        weight = turn.tokens.weight.double().square()
        selection = is_selection(turn.tokens.index // length)
        found[turn.expert] = effective(weight[selection]) + effective(weight[~selection])
    return found


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of an expert.

    Attributes:
        rows: the calibration row of each token of the block, on the host.
        inputs: moments of what gate and up get.
        inner: moments of what the down projection gets.
        gradients: of each linear's output, by its name.
    """

    rows: Tensor
    inputs: SplitMoments
    inner: SplitMoments
    gradients: dict[str, GradientSum]

    @staticmethod
    def zero(turn: Turn, rows: Tensor) -> "_Sums":
        """No tokens seen yet."""
        device = turn.routing.device
        inputs = SplitMoments.zero(turn.gate.shape[0], prior=True, device=device)
        inner = SplitMoments.zero(turn.down.shape[0], prior=True, device=device)
        gradients = {spec.name: GradientSum.zero(spec.shape[1], device) for spec in turn.linears}
        return _Sums(rows, inputs, inner, gradients)

    def add(self, span: Span, inner: Tensor) -> None:
        """Add tokens with what the down projection gets of them."""
        rows, square = self.rows[span.index], span.weight.square()
        self.inputs.add(span.x.detach(), rows, square)
        self.inner.add(inner.detach(), rows, square)


@dataclass(frozen=True)
class RoutedGradients:
    """Gradients with respect to the experts' inputs [T, D] and the routing weights [T, A], on the host."""

    x: Tensor
    weight: Tensor

    @staticmethod
    def of(task: MeasuredExperts) -> "RoutedGradients":
        """None yet, for the tokens of a task that go backward."""
        active = task.routing.weight.shape[1]
        return RoutedGradients(
            scratch(task.folder, task.upstream.shape), torch.zeros(len(task.upstream), active)
        )

    def add(self, turn: Turn, result: Result) -> None:
        """Add those of an expert."""
        gradients, count = States.of(result), len(result["weight"])
        self.weight[turn.tokens.index[:count], turn.tokens.slot[:count]] = result["weight"]
        for part in token_spans(count):
            self.x[turn.tokens.index[part]] += gradients[part]
