"""The measurement: for every linear, what each choice of bits costs, in nats per token.

Two passes over the model. Forward, the dense hidden states before every block are left on disk. Backward,
from the head to the first block, gradients of the log-likelihood flow through each block (of some rows, where
there are many) while its linears' inputs and output gradients are summed up; each linear then gets its curve.
Finished linears and the gradients before the last passed block are files, so that a second run goes on where
the first one stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Alone, Crew
from dbrx_quant.calibration.blocks.head import head_gradients
from dbrx_quant.calibration.blocks.hooks import Watch
from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.routing import ExpertCoverage, coverage
from dbrx_quant.calibration.blocks.shares import shared_out
from dbrx_quant.calibration.blocks.states import States, new_states, open_states, scratch
from dbrx_quant.calibration.blocks.walk import (
    batches,
    check_states,
    embed_rows,
    route,
    run_dense_block,
    token_rows,
    token_spans,
    turns,
)
from dbrx_quant.calibration.statistics.held_out import HELD_OUT_TOKENS, HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.quantize.budget.expert import MeasuredExperts, RoutedGradients, effective_tokens
from dbrx_quant.quantize.budget.measure import Measurer
from dbrx_quant.quantize.entries import REMEDY, Entry, priced
from dbrx_quant.quantize.measurement import Measurement, read_coverage
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.prepare import spread_columns
from dbrx_quant.runtime.families.facts import ExpertsSpec
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.sealed import remove
from dbrx_quant.runtime.kernels.device import upload
from dbrx_quant.runtime.kernels.float_matmul import rounded_products
from dbrx_quant.runtime.output.progress import Progress

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
        crew: who takes the experts.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    progress: Progress
    seed: int = 0
    effort: Effort = "default"
    held_out: Tensor | None = None
    crew: Crew = field(default_factory=Alone)

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
        return self.measurer.entry(name)

    @property
    def measurer(self) -> Measurer:
        """What measures and writes linears."""
        return Measurer(self.folder / "linears", self.effort, len(self.tokens) / self.backward_rows)

    def coverage(self, block: int) -> Path:
        """How many tokens each expert of a block saw."""
        return self.folder / f"coverage-{block:03}.json"


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
        add = shared_out(job.crew, index, job.folder)
        routing = run_dense_block(job.model, index, states, output, job.folder, add_experts=add)
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
    job.measurer.measure([head], moments, held_out, {head.name: total}, lambda _: weight)


def _backward(job: MeasureJob, index: int) -> None:
    """One block of the backward pass: gradients before it, curves of its linears."""
    spec = job.model.architecture.blocks[index]
    device = job.model.device
    states, upstream = (open_states(path, device) for path in (job.states(index), job.gradients(index + 1)))
    live = job.model.block(index)
    routed: RoutedGradients | None = None
    if spec.experts:
        routed = _backward_experts(job, live, states, upstream, spec.experts)
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
            job.measurer.measure(stage, moments, inputs, watch.gradients, job.model.dense)


def _backward_experts(
    job: MeasureJob, live: LiveBlock, states: States, upstream: States, experts: ExpertsSpec
) -> RoutedGradients:
    index, (rows, length, hidden) = live.spec.index, states.shape
    routing = route(live, states, None, scratch(job.folder, (rows * length, hidden)))
    seen = job.tokens.numel()
    task = MeasuredExperts(
        job.model,
        index,
        experts,
        routing,
        length,
        seen,
        effective_tokens(routing.part(slice(seen)), experts, length),
        upstream.flat,
        job.gradients(index + 1),
        job.measurer,
        job.folder,
        job.crew,
    )
    gradients = RoutedGradients.of(task)
    for turn, result in job.crew.each(task, turns(task.routing, experts)):
        gradients.add(turn, result)
        job.progress.step(f"block {index}, expert {turn.expert}")
    return gradients


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
