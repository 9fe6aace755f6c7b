"""The measurement: for every linear, what each choice of bits costs, in nats per token.

Two passes over the model. Forward, the dense hidden states before every block are left on disk. Backward,
from the head to the first block, gradients of the log-likelihood flow through each block (of some rows, where
there are many) while its linears' inputs and output gradients are summed up; each linear then gets its curve.
Finished linears and the gradients before the last passed block are files, so that a second run goes on where
the first one stopped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.head import head_gradients
from dbrx_quant.calibration.blocks.hooks import Watch
from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.routing import ExpertCoverage, coverage
from dbrx_quant.calibration.blocks.states import States, new_states, open_states, scratch
from dbrx_quant.calibration.blocks.walk import (
    Span,
    Turn,
    Weights,
    batches,
    check_states,
    embed_rows,
    route,
    run_dense_block,
    token_rows,
    token_spans,
    turns,
)
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HELD_OUT_TOKENS, HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize.budget.curve import draw, feedback_factors, held_out_ratio
from dbrx_quant.quantize.entries import REMEDY, Entry, priced
from dbrx_quant.quantize.measurement import LinearMeasurement, Measurement, read_coverage
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.prepare import prepare, sampled_energy, spread_columns
from dbrx_quant.quantize.solve.shrinkage import choose_shrinkage
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.sealed import remove
from dbrx_quant.runtime.kernels.device import download, upload
from dbrx_quant.runtime.kernels.float_matmul import narrowed, product, rounded_products
from dbrx_quant.runtime.progress import Progress

GRADIENT_TOKENS = 2048  # from twice as many on, only a part of the rows goes backward as well
MOST_STRIDE = 2  # that part is a half at least

_COVERAGE = JsonFile("the coverage of a block", version=1, remedy=REMEDY, sealed=True)


@dataclass(frozen=True)
class MeasureJob:
    """Where a measurement works and with what.

    Attributes:
        model: the source.
        tokens: [R, L] int64 token ids.
        folder: for the files between the passes.
        progress: told of every finished step.
        seed: of the labels that the gradients are of.
        effort: what the linears will be solved with.
        held_out: [H, L] int64 token ids that nothing is chosen on; what errors cost there is measured too.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    progress: Progress
    seed: int = 0
    effort: Effort = "default"
    held_out: Tensor | None = None

    @property
    def _stride(self) -> int:
        return backward_stride(self.tokens.numel())

    @property
    def rows(self) -> Tensor:
        """The token ids of all states: rows that go backward, other calibration rows, held-out rows."""
        calibration = [self.tokens[i :: self._stride] for i in range(self._stride)]
        return torch.cat([*calibration, self._held_out_rows])

    @property
    def _held_out_rows(self) -> Tensor:
        if self.held_out is None:
            return self.tokens[:0]
        count = max(1, HELD_OUT_TOKENS // self.held_out.shape[1])
        return self.held_out[spread_columns(len(self.held_out), count)]

    @property
    def backward_rows(self) -> int:
        """Number of rows that gradients are summed over: these cost twice as much as inputs."""
        return len(self.tokens[:: self._stride])

    def states(self, block: int) -> Path:
        """Hidden states of all `rows` before a block."""
        return self.folder / f"states-{block:03}.safetensors"

    def gradients(self, block: int) -> Path:
        """Gradients with respect to those states."""
        return self.folder / f"gradients-{block:03}.safetensors"

    @property
    def next_backward(self) -> int:
        """How many blocks the backward pass has not been through; one more if nor through the head.

        All of them where the work on a later one is not whole.
        """
        blocks = self.model.architecture.blocks
        block = next((i for i in range(len(blocks) + 1) if self.gradients(i).exists()), len(blocks) + 1)
        passed = [spec for later in blocks[block:] for spec in later.linears()]
        whole = all(self.entry(spec.name).exists() for spec in (*passed, self.model.architecture.head))
        return block if whole else len(blocks) + 1

    def entry(self, name: str) -> Path:
        """What was measured of one linear."""
        return self.folder / "linears" / f"{name}.json"

    def coverage(self, block: int) -> Path:
        """How many tokens each expert of a block saw."""
        return self.folder / f"coverage-{block:03}.json"


@dataclass(frozen=True)
class _Shared:
    """Results shared by similar linears of a block, so that they are computed for the first expert alone.

    Attributes:
        shrinkage: per role and tokens per channel, in steps of four times as many.
        feedback: per role, its factor at each width.
    """

    shrinkage: dict[tuple[str, int], Shrinkage]
    feedback: dict[str, Sequence[float]]


def backward_stride(tokens: int) -> int:
    """Stride between rows used in the backward pass, for a number of calibration tokens."""
    return min(MOST_STRIDE, max(1, tokens // GRADIENT_TOKENS))


def measure(job: MeasureJob) -> Measurement:
    """Run both passes and return the measurement, errors in nats per token."""
    (job.folder / "linears").mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        _forward(job)
        count, todo = len(job.model.architecture.blocks), job.next_backward
        if todo > count:
            _head(job)
        job.progress.step("head")
        for index in reversed(range(count)):
            if index < todo:
                _backward(job, index)
                remove(job.gradients(index + 1))  # those before this block are on disk by now
            job.progress.step(f"backward, block {index}")
    return assemble(job)


def _forward(job: MeasureJob) -> None:
    if not job.states(0).exists():
        embed_rows(job.model, job.rows, job.states(0))
    for block in job.model.architecture.blocks:
        known = job.coverage(block.index).exists() or block.experts is None
        if not (known and job.states(block.index + 1).exists()):
            _forward_block(job, block.index)
        job.progress.step(f"forward, block {block.index}")


def _forward_block(job: MeasureJob, index: int) -> None:
    states = open_states(job.states(index), job.model.device)
    with new_states(job.states(index + 1), states.shape) as output:
        routing = run_dense_block(job.model, index, states, output, job.folder)
        if routing is not None:
            experts = job.model.architecture.blocks[index].experts
            assert experts is not None
            seen = coverage(routing.part(slice(job.tokens.numel())), experts.count)
            _COVERAGE.write(job.coverage(index), {"experts": [vars(one) for one in seen]})
        check_states(output, f"output of block {index}")


def _head(job: MeasureJob) -> None:
    architecture, count = job.model.architecture, len(job.model.architecture.blocks)
    head = architecture.head
    states = open_states(job.states(count), job.model.device)
    flat = states.flat
    weight, backward = job.model.dense(head), states.part(slice(job.backward_rows))
    with new_states(job.gradients(count), backward.shape) as gradients:
        total = head_gradients(
            job.model,
            backward.flat,
            gradients.view(-1, architecture.hidden),
            weight,
            job.seed,
        )
    moments = SplitMoments.zero(head.shape[0], device=job.model.device)
    rows, held_out = token_rows(states), HeldOutInputs()
    seen = job.tokens.numel()
    for part in token_spans(seen):
        moments.add(job.model.final_norm(flat[part]), rows[part])
    for part in token_spans(len(flat) - seen):
        held_out.add(job.model.final_norm(flat.part(slice(seen, None))[part]))
    _measure_linears(job, [head], moments, held_out, {head.name: total}, lambda _: weight, _Shared({}, {}))


def _measure_linears(
    job: MeasureJob,
    specs: list[LinearSpec],
    moments: SplitMoments,
    held_out: HeldOutInputs,
    gradients: dict[str, GradientSum],
    weight_of: Callable[[LinearSpec], Tensor],
    shared: _Shared,
) -> None:
    """Draw the curves of linears that share their inputs, and write them."""
    role, todo = specs[0].role, [spec for spec in specs if not job.entry(spec.name).exists()]
    if not todo:
        entry = Entry.read(job.entry(specs[0].name))
        shared.shrinkage[(role, entry.step)] = entry.linear.shrinkage
        shared.feedback[role] = entry.linear.feedback
        return
    moments.check(specs[0].name)
    own, weight = moments.fit.effective + moments.selection.effective, weight_of(specs[0])
    step = round(math.log2(max(own, 1.0) / specs[0].shape[0]) / 2)
    if (role, step) not in shared.shrinkage:
        shared.shrinkage[(role, step)] = choose_shrinkage(weight, moments)
    shrinkage = shared.shrinkage[(role, step)]
    joined = moments.joined()
    matrix = hessian(joined, moments.prior, shrinkage)
    energies = {spec.name: sampled_energy(weight_of(spec), matrix) for spec in todo}
    prepared = prepare(matrix)
    if role not in shared.feedback:
        columns = gradients[specs[0].name].column_weights()
        shared.feedback[role] = feedback_factors(weight, prepared, columns, job.effort)
    ratio = held_out_ratio(weight, prepared, held_out)
    for spec in todo:
        total = gradients[spec.name]
        columns = total.column_weights()
        curve = draw(
            weight_of(spec), prepared, columns, energies[spec.name], shared.feedback[role], spec.bias
        )
        measured = LinearMeasurement(
            role=spec.role,
            shape=spec.shape,
            options=curve.options,
            energy=curve.energy,
            tokens=joined.tokens,
            effective_tokens=joined.effective,
            weight=joined.weight,
            held_out_ratio=ratio,
            shrinkage=shrinkage,
            feedback=curve.feedback,
        )
        gradient = total.total * len(job.tokens) / job.backward_rows
        Entry(measured, gradient, step).write(job.entry(spec.name))


def _backward(job: MeasureJob, index: int) -> None:
    """One block of the backward pass: gradients before it, curves of its linears."""
    spec = job.model.architecture.blocks[index]
    device = job.model.device
    states, upstream = (open_states(path, device) for path in (job.states(index), job.gradients(index + 1)))
    live = job.model.block(index)
    shared = _Shared({}, {})
    routed: _RoutedGradients | None = None
    if spec.experts:
        routed = _backward_experts(job, live, states, upstream, spec.experts, shared)
    watch, length, rows = Watch(live), states.shape[1], token_rows(states).view(states.shape[:2])
    with new_states(job.gradients(index), upstream.shape) as gradients:
        for part in batches(upstream):
            x = states[part].requires_grad_()
            watch.rows = rows[part].flatten()
            with torch.enable_grad():
                output, routing = live(x)
            roots, seeds = [output], [upstream[part]]
            if routing is not None and routed is not None:
                flat = slice(part.start * length, part.stop * length)
                roots += [routing.x, routing.weight]
                seeds += [upload(routed.x[flat], device), routed.weight[flat].to(routing.weight)]
            with rounded_products(device):
                torch.autograd.backward(roots, seeds)
            assert x.grad is not None
            gradients[part] = x.grad
        others = slice(len(upstream), len(job.tokens))
        inputs_only, held_out = states.part(others), states.part(slice(len(job.tokens), None))
        for part in batches(inputs_only):
            watch.rows = rows[others][part].flatten()
            live(inputs_only[part])
        watch.rows = None
        for part in batches(held_out):
            live(held_out[part])
        watch.close()
        check_states(gradients, f"gradients before block {index}")
        for stage, moments, inputs in zip(spec.stages, watch.moments, watch.held_out, strict=True):
            _measure_linears(job, list(stage), moments, inputs, watch.gradients, job.model.dense, shared)


@dataclass(frozen=True)
class _RoutedGradients:
    """Gradients with respect to the experts' inputs [T, D] and the routing weights [T, A], on the host."""

    x: Tensor
    weight: Tensor


def _backward_experts(
    job: MeasureJob,
    live: LiveBlock,
    states: States,
    upstream: States,
    experts: ExpertsSpec,
    shared: _Shared,
) -> _RoutedGradients:
    x = scratch(job.folder, (states.shape[0] * states.shape[1], states.shape[-1]))
    routing, flat = route(live, states, None, x), upstream.flat
    result = _RoutedGradients(
        scratch(job.folder, flat.shape), torch.zeros(len(flat), routing.weight.shape[1])
    )
    rows, count = token_rows(states), job.tokens.numel()
    for turn in turns(routing, experts):
        _measure_expert(
            job, turn.part(slice(count)), turn.part(slice(count, None)), rows, flat, result, shared
        )
        job.progress.step(f"block {live.spec.index}, expert {turn.expert}")
    return result


@dataclass(frozen=True)
class _ExpertSums:
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
    def zero(turn: Turn, rows: Tensor) -> "_ExpertSums":
        """No tokens seen yet."""
        device = turn.routing.device
        inputs = SplitMoments.zero(turn.gate.shape[0], prior=True, device=device)
        inner = SplitMoments.zero(turn.down.shape[0], prior=True, device=device)
        gradients = {spec.name: GradientSum.zero(spec.shape[1], device) for spec in turn.linears}
        return _ExpertSums(rows, inputs, inner, gradients)

    def add(self, span: Span, inner: Tensor) -> None:
        """Add tokens with what the down projection gets of them."""
        rows, square = self.rows[span.index], span.weight.square()
        self.inputs.add(span.x.detach(), rows, square)
        self.inner.add(inner.detach(), rows, square)


def _measure_expert(
    job: MeasureJob,
    seen: Turn,
    held_out: Turn,
    rows: Tensor,
    upstream: States,
    result: _RoutedGradients,
    shared: _Shared,
) -> None:
    """Take an expert's tokens through it, those of `upstream` [T, D] backward as well, and draw its curves.

    Args:
        job: where and with what.
        seen: the expert's turn with the tokens to calibrate on, those that go backward first.
        held_out: its turn with the held-out tokens.
        rows: the calibration row of each token.
        upstream: gradients with respect to the block's output.
        result: gradients with respect to what the expert got are added to it.
        shared: what linears of this block have in common.
    """
    weights = seen.dense(job.model)
    gate, up, down = (narrowed(weight) for weight in weights)
    sums = _ExpertSums.zero(seen, rows)
    backward = int((seen.tokens.index < len(upstream)).sum())
    for span in seen.spans(end=backward):
        _backward_span(seen, span, (gate, up, down), upstream, result, sums)
    for span in seen.spans(begin=backward):
        sums.add(span, seen.inner(span.x, gate, up))
    for x in seen.others():
        sums.inputs.add_prior(x)
        sums.inner.add_prior(seen.inner(x, gate, up))
    held_out_inputs, held_out_inner, span = HeldOutInputs(), HeldOutInputs(), held_out.whole()
    held_out_inputs.add(span.x, span.weight.square())
    held_out_inner.add(seen.inner(span.x, gate, up), span.weight.square())
    dense = dict(zip(seen.linears, weights, strict=True)).__getitem__
    _measure_linears(job, [seen.gate, seen.up], sums.inputs, held_out_inputs, sums.gradients, dense, shared)
    _measure_linears(job, [seen.down], sums.inner, held_out_inner, sums.gradients, dense, shared)


def _backward_span(
    turn: Turn, span: Span, weights: Weights, upstream: States, result: _RoutedGradients, sums: _ExpertSums
) -> None:
    """Take some tokens through an expert and back."""
    gate, up, down = weights
    x, index = span.x.requires_grad_(), span.index
    with torch.enable_grad():
        g, u = product(x, gate), product(x, up)
        h = turn.activate(g) * u
    above = upstream[index]
    y_gradient = span.weight[:, None] * above
    y = product(h.detach(), down)
    result.weight[index, span.slot] = (y * above).sum(-1).cpu()
    g_gradient, u_gradient, x_gradient = torch.autograd.grad(h, (g, u, x), product(y_gradient, down.T))
    result.x[index] += download(x_gradient)
    for spec, gradient in zip(turn.linears, (g_gradient, u_gradient, y_gradient), strict=True):
        sums.gradients[spec.name].add(gradient)
    sums.add(span, h)


def assemble(job: MeasureJob) -> Measurement:
    """The measurement from all linears' entries, their errors priced."""
    architecture, count = job.model.architecture, job.tokens.numel()
    entries = {spec.name: Entry.read(job.entry(spec.name)) for spec in architecture.linears()}
    sparse = [block for block in architecture.blocks if block.experts]
    return Measurement(
        priced(entries, architecture, count),
        count,
        {block.index: _covered(job, block.index) for block in sparse},
    )


def _covered(job: MeasureJob, block: int) -> tuple[ExpertCoverage, ...]:
    return read_coverage(_COVERAGE.read(job.coverage(block)), "experts")
