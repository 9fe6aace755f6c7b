"""The measurement: for every linear, what each choice of bits costs, in nats per token.

Two passes over the model. Forward, the dense hidden states before every block are left on disk. Backward,
from the head to the first block, gradients of the log-likelihood flow through each block (of some rows, where
there are many) while its linears' inputs and output gradients are summed up; each linear then gets its curve.
Finished linears and passed blocks are files, so that a second run goes on where the first one stopped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.experts import activation, coverage, expert_inner, tokens_of
from dbrx_quant.calibration.fisher import GradientSum, head_gradients
from dbrx_quant.calibration.hessian import Shrinkage, SplitMoments, hessian
from dbrx_quant.calibration.passes import batches, check_states, dense_shares, route, token_rows, token_spans
from dbrx_quant.calibration.states import new_states, open_states
from dbrx_quant.calibration.streamed import LiveBlock, StreamedModel
from dbrx_quant.calibration.unseen import UNSEEN_TOKENS, UnseenInputs
from dbrx_quant.calibration.watch import Watch
from dbrx_quant.quantize.curve import (
    choose_shrinkage,
    draw,
    feedback_factors,
    prepare,
    sampled_energy,
    spread_columns,
    unseen_ratio,
)
from dbrx_quant.quantize.ldlq import Effort
from dbrx_quant.quantize.progress import Progress
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.files import write_json

GRADIENT_TOKENS = 2048  # from twice as many on, only a part of the rows goes backward as well
MOST_STRIDE = 2  # that part is a half at least
POOLED = 0.3  # share of an expert's price that comes from all experts of its block


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
        unseen: [U, L] int64 token ids that nothing is chosen on; what errors cost there is measured as well.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    progress: Progress
    seed: int = 0
    effort: Effort = "default"
    unseen: Tensor | None = None

    @property
    def _stride(self) -> int:
        return backward_stride(self.tokens.numel())

    @property
    def rows(self) -> Tensor:
        """The token ids of all states: rows that go backward, the other rows to calibrate on, unseen ones."""
        return torch.cat([*(self.tokens[i :: self._stride] for i in range(self._stride)), self._unseen_rows])

    @property
    def _unseen_rows(self) -> Tensor:
        if self.unseen is None:
            return self.tokens[:0]
        return self.unseen[spread_columns(len(self.unseen), max(1, UNSEEN_TOKENS // self.unseen.shape[1]))]

    @property
    def backward_rows(self) -> int:
        """How many rows gradients are summed up over: they cost twice as much as inputs."""
        return len(self.tokens[:: self._stride])

    def states(self, block: int) -> Path:
        """Hidden states of all `rows` before a block."""
        return self.folder / f"states-{block:03}.npy"

    def gradients(self, block: int) -> Path:
        """Gradients with respect to those states."""
        return self.folder / f"gradients-{block:03}.npy"

    def entry(self, name: str) -> Path:
        """What was measured of one linear."""
        return self.folder / "linears" / f"{name}.json"


@dataclass(frozen=True)
class _Shared:
    """What linears of a block that are alike have in common: of many experts only the first one pays for it.

    Attributes:
        shrinkage: per role and tokens per channel, in steps of four times as many.
        feedback: per role, its factor at each width.
    """

    shrinkage: dict[tuple[str, int], Shrinkage]
    feedback: dict[str, Sequence[float]]


def backward_stride(tokens: int) -> int:
    """Of how many rows one goes backward, where there are so many tokens."""
    return min(MOST_STRIDE, max(1, tokens // GRADIENT_TOKENS))


def measure(job: MeasureJob) -> dict[str, Any]:
    """Run both passes and return the measurement (see `assemble` for its contents)."""
    (job.folder / "linears").mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        _forward(job)
        _head(job)
        for index in reversed(range(len(job.model.architecture.blocks))):
            _backward(job, index)
    return assemble(job)


def _forward(job: MeasureJob) -> None:
    architecture = job.model.architecture
    ids = job.rows
    shape = (*ids.shape, architecture.hidden)
    if not job.states(0).exists():
        with new_states(job.states(0), shape) as states:
            for part in batches(states):
                states[part] = job.model.embed(ids[part])
    for block in architecture.blocks:
        if not job.states(block.index + 1).exists():
            states = open_states(job.states(block.index))
            live = job.model.block(block.index)
            with new_states(job.states(block.index + 1), shape) as output:
                if block.experts is None:
                    for part in batches(states):
                        output[part] = live(states[part])[0]
                else:
                    x_path = job.folder / "experts-input.npy"
                    with new_states(x_path, (ids.numel(), architecture.hidden)) as x:
                        routing = route(live, states, output, x)
                        report = coverage(routing.part(slice(job.tokens.numel())), block.experts.count)
                        write_json(job.folder / f"coverage-{block.index:03}.json", report)
                        for at, share in dense_shares(job.model, block.experts, routing):
                            output.view(-1, architecture.hidden)[at] += share
                    x_path.unlink()
                check_states(output, f"output of block {block.index}")
        job.progress.step(f"forward, block {block.index}")


def _head(job: MeasureJob) -> None:
    architecture, count = job.model.architecture, len(job.model.architecture.blocks)
    head = architecture.head
    if job.gradients(count).exists() and job.entry(head.name).exists():
        job.progress.step("head")
        return
    states = open_states(job.states(count))
    flat = states.view(-1, architecture.hidden)
    weight, backward = job.model.dense(head), states[: job.backward_rows]
    with new_states(job.gradients(count), tuple(backward.shape)) as gradients:
        total = head_gradients(
            job.model,
            backward.view(-1, architecture.hidden),
            gradients.view(-1, architecture.hidden),
            weight,
            job.seed,
        )
    moments, rows, unseen = SplitMoments.zero(head.shape[0]), token_rows(states), UnseenInputs()
    seen = job.tokens.numel()
    for part in token_spans(seen):
        moments.add(job.model.final_norm(flat[part]), rows[part])
    for part in token_spans(len(flat) - seen):
        unseen.add(job.model.final_norm(flat[seen:][part]))
    _measure_linears(job, [head], moments, unseen, {head.name: total}, lambda _: weight, _Shared({}, {}))
    job.progress.step("head")


def _measure_linears(
    job: MeasureJob,
    specs: list[LinearSpec],
    moments: SplitMoments,
    unseen: UnseenInputs,
    gradients: dict[str, GradientSum],
    weight_of: Callable[[LinearSpec], Tensor],
    shared: _Shared,
) -> None:
    """Draw the curves of linears that share their inputs, and write them."""
    role, todo = specs[0].role, [spec for spec in specs if not job.entry(spec.name).exists()]
    if not todo:
        entry = json.loads(job.entry(specs[0].name).read_text())
        shared.shrinkage[(role, entry["step"])] = Shrinkage(entry["damping"], entry["prior"])
        shared.feedback[role] = entry["feedback"]
        return
    moments.check(specs[0].name)
    own, weight = moments.fit.effective + moments.held.effective, weight_of(specs[0])
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
    ratio = unseen_ratio(weight, prepared, unseen)
    for spec in todo:
        total = gradients[spec.name]
        columns = total.column_weights()
        curve = draw(
            weight_of(spec), prepared, columns, energies[spec.name], shared.feedback[role], spec.bias
        )
        write_json(
            job.entry(spec.name),
            {
                "role": spec.role,
                "shape": list(spec.shape),
                "tokens": joined.tokens,
                "effective_tokens": joined.effective,
                "weight": joined.weight,
                "gradient": total.total * len(job.tokens) / job.backward_rows,
                "step": step,
                **asdict(shrinkage),
                "feedback": list(curve.feedback),
                "unseen": ratio,
                "energy": curve.energy,
                "options": [list(option) for option in curve.options],
            },
        )


def _backward(job: MeasureJob, index: int) -> None:
    """One block of the backward pass: gradients before it, curves of its linears."""
    spec = job.model.architecture.blocks[index]
    linears = list(spec.linears())
    if job.gradients(index).exists() and all(job.entry(s.name).exists() for s in linears):
        job.progress.step(f"backward, block {index}")
        return
    states, upstream = open_states(job.states(index)), open_states(job.gradients(index + 1))
    live = job.model.block(index)
    shared = _Shared({}, {})
    routed: _RoutedGradients | None = None
    if spec.experts:
        routed = _backward_experts(job, live, states, upstream, spec.experts, shared)
    watch, length, rows = Watch(live), states.shape[1], token_rows(states).view(states.shape[:2])
    with new_states(job.gradients(index), tuple(upstream.shape)) as gradients:
        for part in batches(upstream):
            x = states[part].clone().requires_grad_()
            watch.rows = rows[part].flatten()
            with torch.enable_grad():
                output, routing = live(x)
            roots, seeds = [output], [upstream[part]]
            if routing is not None and routed is not None:
                flat = slice(part.start * length, part.stop * length)
                roots += [routing.x, routing.weight]
                seeds += [routed.x[flat], routed.weight[flat].to(routing.weight.dtype)]
            torch.autograd.backward(roots, seeds)
            assert x.grad is not None
            gradients[part] = x.grad
        others, unseen = slice(len(upstream), len(job.tokens)), slice(len(job.tokens), None)
        for part in batches(states[others]):
            watch.rows = rows[others][part].flatten()
            live(states[others][part])
        watch.rows = None
        for part in batches(states[unseen]):
            live(states[unseen][part])
        watch.close()
        check_states(gradients, f"gradients before block {index}")
        for stage, moments, inputs in zip(spec.stages, watch.moments, watch.unseen, strict=True):
            _measure_linears(job, list(stage), moments, inputs, watch.gradients, job.model.dense, shared)
    job.progress.step(f"backward, block {index}")


@dataclass(frozen=True)
class _RoutedGradients:
    """Gradients with respect to the experts' inputs [T, D] and the routing weights [T, A]."""

    x: Tensor
    weight: Tensor


def _backward_experts(
    job: MeasureJob,
    live: LiveBlock,
    states: Tensor,
    upstream: Tensor,
    experts: ExpertsSpec,
    shared: _Shared,
) -> _RoutedGradients:
    hidden = states.shape[-1]
    x = torch.empty(states.shape[0] * states.shape[1], hidden)
    routing = route(live, states, torch.empty_like(states), x)
    flat = upstream.reshape(-1, hidden)
    result = _RoutedGradients(torch.zeros_like(flat), torch.zeros(len(flat), routing.weight.shape[1]))
    rows, act, seen = token_rows(states), activation(experts.activation), job.tokens.numel()
    calibration, others = routing.part(slice(seen)), routing.part(slice(seen, None))
    for expert, linears in enumerate(experts.linears):
        tokens, unseen = tokens_of(calibration, expert), tokens_of(others, expert)
        gate, up, down = weights = tuple(job.model.dense(spec) for spec in linears)
        dense = dict(zip(linears, weights, strict=True)).__getitem__
        sums = {spec.name: GradientSum.zero(spec.shape[1]) for spec in linears}
        inputs, inner = SplitMoments.zero(gate.shape[1], True), SplitMoments.zero(down.shape[1], True)
        backward = int((tokens.index < len(flat)).sum())  # the first ones
        for part in token_spans(backward):
            index, p = tokens.index[part], tokens.weight[part]
            xe = x[index].requires_grad_()
            with torch.enable_grad():
                g, u = xe @ gate.T, xe @ up.T
                h = act(g) * u
            y_gradient = p[:, None] * flat[index]
            y = h.detach() @ down.T
            result.weight[index, tokens.slot[part]] = (y * flat[index]).sum(-1)
            g_gradient, u_gradient, x_gradient = torch.autograd.grad(h, (g, u, xe), y_gradient @ down)
            result.x[index] += x_gradient
            for spec, gradient in zip(linears, (g_gradient, u_gradient, y_gradient), strict=True):
                sums[spec.name].add(gradient)
            inputs.add(xe.detach(), rows[index], p.square())
            inner.add(h.detach(), rows[index], p.square())
        for part in token_spans(len(tokens.index) - backward):
            index, square = tokens.index[backward:][part], tokens.weight[backward:][part].square()
            inputs.add(x[index], rows[index], square)
            inner.add(expert_inner(x[index], gate, up, act), rows[index], square)
        for part in token_spans(len(tokens.others)):
            assert inputs.prior is not None
            assert inner.prior is not None
            other = x[tokens.others[part]]
            inputs.prior.add(other)
            inner.prior.add(expert_inner(other, gate, up, act))
        unseen_inputs, unseen_inner = UnseenInputs(), UnseenInputs()
        unseen_inputs.add(others.x[unseen.index], unseen.weight.square())
        unseen_inner.add(expert_inner(others.x[unseen.index], gate, up, act), unseen.weight.square())
        _measure_linears(job, list(linears[:2]), inputs, unseen_inputs, sums, dense, shared)
        _measure_linears(job, list(linears[2:]), inner, unseen_inner, sums, dense, shared)
        job.progress.step(f"block {live.spec.index}, expert {expert}")
    return result


def assemble(job: MeasureJob) -> dict[str, Any]:
    """The measurement of all linears, errors in nats per token.

    Returns:
        `tokens`: how many; `coverage`: per block of experts, tokens and shares; `linears`: name → shape,
        tokens, shrinkage, energy (the cost of dropping it, in nats to second order), `unseen` (how many times
        as large errors are on unseen tokens) and `options` [bits on disk, nats per token, group map].
    """
    architecture, count = job.model.architecture, job.tokens.numel()
    entries = {s.name: json.loads(job.entry(s.name).read_text()) for s in architecture.linears()}
    prices = {name: entry["gradient"] / (2 * count) for name, entry in entries.items()}
    for block in architecture.blocks:
        for linears in zip(*(block.experts.linears if block.experts else ()), strict=True):
            prices.update(_pooled_prices([spec.name for spec in linears], entries, count))
    linears_out = {}
    for name, entry in entries.items():
        options = [[bits, error * prices[name], text] for bits, error, text in entry.pop("options")]
        entry["energy"] *= prices[name]
        entry["price"] = prices[name]
        del entry["step"], entry["gradient"]
        linears_out[name] = {**entry, "options": options}
    report = {
        str(block.index): json.loads((job.folder / f"coverage-{block.index:03}.json").read_text())
        for block in architecture.blocks
        if block.experts
    }
    return {"tokens": count, "coverage": report, "linears": linears_out}


def _pooled_prices(names: list[str], entries: dict[str, Any], count: int) -> dict[str, float]:
    """Prices of one role's experts: gradients of an expert with few tokens lean on those of all.

    A price is the sum of squared gradients; per unit of squared routing weight it is much the same for all
    experts of a block, which is what an expert seen rarely falls back to (as if 32 average tokens had said
    so).
    """
    gradient = sum(entries[n]["gradient"] for n in names)
    weight = sum(entries[n]["weight"] for n in names)
    tokens = sum(entries[n]["tokens"] for n in names)
    if not weight:
        return {n: 0.0 for n in names}
    usual, pseudo = gradient / weight, 32 * weight / tokens
    prices = {}
    for n in names:
        own = entries[n]["weight"]
        seen = max(own, weight / tokens)  # an expert never seen counts as seen once
        estimate = (entries[n]["gradient"] + pseudo * usual) / (own + pseudo)
        prices[n] = seen * ((1 - POOLED) * estimate + POOLED * usual) / (2 * count)
    return prices
