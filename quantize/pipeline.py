"""The quantization pass: block by block, each linear solved on inputs that earlier quantized linears produce.

Inside a block the stages follow the data: query, key and value are solved on the block's input, the output
projection on what their quantized weights make of it, and so on; an expert's down projection sees its
quantized gate and up projections. Every finished linear is a file before the next one starts.

The original's states run beside the quantized model's: the linears that write into the residual stream are
changed so that they also repair what the quantized linears before them have spoilt (`repair`). Rows that are
not calibrated on go through both, and tell at the end how far the quantized model is from the original.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_quant.calibration.hessian import Moments, SplitMoments
from dbrx_quant.calibration.states import new_states, open_states
from dbrx_quant.calibration.streamed import LiveBlock, Routing, StreamedModel
from dbrx_quant.calibration.walk import (
    Turn,
    add_dense_experts,
    batches,
    check_states,
    route,
    token_rows,
    turns,
)
from dbrx_quant.quantize.ldlq import Effort
from dbrx_quant.quantize.measurement import Measurement
from dbrx_quant.quantize.progress import Progress
from dbrx_quant.quantize.refit import ResidualTarget
from dbrx_quant.quantize.repair import DEFAULT_REPAIR, NO_REPAIR, Repair, RepairMoments
from dbrx_quant.quantize.solve import Solved, solve_linears
from dbrx_quant.quantize.stream import RepairedStream, Stream, finish_repair
from dbrx_quant.runtime.evaluate import evaluate
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec, load_bias, to_half
from dbrx_quant.runtime.files import save_tensors, write_json
from dbrx_quant.runtime.format import padded_columns
from dbrx_quant.runtime.group_text import parse_groups
from dbrx_quant.runtime.ops import dequantize


@dataclass(frozen=True)
class QuantizeJob:
    """Where a quantization works and with what.

    Attributes:
        model: the source.
        tokens: [R, L] int64 token ids to calibrate on.
        folder: for finished linears and the states between blocks.
        measurement: of the model.
        groups: linear → group map as text.
        progress: told of every finished linear.
        effort: of the solver.
        repair: how linears that write into the residual stream make good what it has lost.
        unseen: [U, L] int64 token ids that measure the distance to the original; None: it is not measured.
        refit: whether the maxima of each linear's groups are fitted once more when its codes are fixed.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    measurement: Measurement
    groups: Mapping[str, str]
    progress: Progress
    effort: Effort = "default"
    repair: Repair = DEFAULT_REPAIR
    unseen: Tensor | None = None
    refit: bool = False

    @property
    def all_tokens(self) -> Tensor:
        """[R + U, L]: the rows of all states, those to calibrate on first."""
        return self.tokens if self.unseen is None else torch.cat([self.tokens, self.unseen])

    @property
    def original_tokens(self) -> Tensor | None:
        """The rows that are followed through the original too: all for the repair, else those not seen."""
        return self.unseen if self.repair == NO_REPAIR else self.all_tokens

    def calibration(self, states: Tensor) -> Tensor:
        """The part of states that is calibrated on."""
        return states[: len(self.tokens)]

    def states(self, block: int) -> Path:
        """Hidden states before a block, as the quantized blocks before it make them."""
        return self.folder / f"states-{block:03}.npy"

    def original(self, block: int) -> Path:
        """The original's hidden states before a block."""
        return self.folder / f"original-{block:03}.npy"

    def middle(self, block: int) -> Path:
        """The original's hidden states after a block's attention."""
        return self.folder / f"middle-{block:03}.npy"

    @property
    def distance(self) -> Path:
        """The distance to the original, measured."""
        return self.folder / "distance.json"

    def linear(self, name: str) -> Path:
        """The packed tensors of one linear."""
        return self.folder / "linears" / f"{name}.safetensors"

    def unfinished(self, specs: Sequence[LinearSpec]) -> list[LinearSpec]:
        """Those of some linears that have no file yet."""
        return [spec for spec in specs if not self.linear(spec.name).exists()]

    @property
    def next_block(self) -> int:
        """The first block that is not finished: the last one that there are states before."""
        count = len(self.model.architecture.blocks)
        return max((i for i in range(count + 1) if self.states(i).exists()), default=0)


def quantize_model(job: QuantizeJob) -> dict[str, Any] | None:
    """Solve every linear of the model that has no file yet.

    Returns:
        The distance to the original on the unseen rows (`runtime.evaluate.Scores`), None without any.
    """
    (job.folder / "linears").mkdir(parents=True, exist_ok=True)
    blocks = job.model.architecture.blocks
    with torch.no_grad():
        first = job.next_block
        if not job.states(first).exists():
            if job.original_tokens is not None:
                _embed(job, job.original_tokens, job.original(0))
            _embed(job, job.all_tokens, job.states(0))
        for block in blocks[:first]:
            for spec in block.linears():
                job.progress.step(spec.name)
        for block in blocks[first:]:
            _quantize_block(job, block.index)
            job.states(block.index).unlink()  # the next block's states are on disk by now
            for path in (job.original(block.index), job.middle(block.index)):
                path.unlink(missing_ok=True)
        _quantize_head(job)
        if job.unseen is not None and not job.distance.exists():
            write_json(job.distance, _measure_distance(job, job.unseen))
        job.original(len(blocks)).unlink(missing_ok=True)
    return json.loads(job.distance.read_text(encoding="utf-8")) if job.unseen is not None else None


def _embed(job: QuantizeJob, tokens: Tensor, path: Path) -> None:
    with new_states(path, (*tokens.shape, job.model.architecture.hidden)) as states:
        for part in batches(states):
            states[part] = job.model.embed(tokens[part])


def _quantize_block(job: QuantizeJob, index: int) -> None:
    if job.original_tokens is not None:
        _run_original(job, index)
    live = job.model.block(index)
    states = open_states(job.states(index))
    for stage in live.spec.stages:
        if todo := job.unfinished(stage):
            if job.repair.repairs(stage[0].role):
                _repair_and_solve(job, live, stage[0], job.calibration(states))
            else:
                moments = _stage_moments(live, stage[0], job.calibration(states))
                _solve(job, {spec.name: job.model.dense(spec) for spec in todo}, todo, moments)
        live.install({spec.name: finished_weight(job, spec) for spec in stage})
        for spec in stage:
            job.progress.step(spec.name)
    with new_states(job.states(index + 1), tuple(states.shape)) as output:
        if live.spec.experts is None:
            for part in batches(states):
                output[part] = live(states[part])[0]
        else:
            _quantize_experts(job, live, live.spec.experts, states, output)
        check_states(output, f"output of quantized block {index}")


def _run_original(job: QuantizeJob, index: int) -> None:
    """Write the original's states in the middle of a block and after it."""
    if job.middle(index).exists() and job.original(index + 1).exists():
        return
    live = job.model.block(index)
    states = open_states(job.original(index))
    shape, hidden, experts = tuple(states.shape), states.shape[-1], live.spec.experts
    with new_states(job.original(index + 1), shape) as output, new_states(job.middle(index), shape) as middle:
        if experts is None:
            for part in batches(states):
                output[part], middle[part] = live.with_middle(states[part])
            return
        x_path = job.folder / "experts-input.npy"
        with new_states(x_path, (states.shape[0] * states.shape[1], hidden)) as x:
            routing = route(live, states, middle, x)
            output.copy_(middle)
            add_dense_experts(output.view(-1, hidden), job.model, experts, routing)
        x_path.unlink()


def _repair_and_solve(job: QuantizeJob, live: LiveBlock, spec: LinearSpec, states: Tensor) -> None:
    """Quantize an output or down projection outside of experts, repaired."""
    attention = spec.role == "o"
    goal = open_states(job.middle(live.spec.index) if attention else job.original(live.spec.index + 1))
    inputs, rows = SplitMoments.zero(spec.shape[0]), token_rows(states).view(states.shape[:2])
    seen: list[Tensor] = []
    moments = RepairMoments(inputs, *spec.shape)
    handle = live.submodule(spec).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for part in batches(states):
            output = live.without_mlp(states[part]) if attention else live(states[part])[0]
            x, token_row = seen.pop().flatten(0, -2), rows[part].flatten()
            inputs.add(x, token_row)
            moments.add(x, (goal[part] - output).flatten(0, 1), token_row)
    finally:
        handle.remove()
    inputs.check(spec.name)
    weight, target = finish_repair(job.model.dense(spec), moments, job.repair, job.refit)
    del moments
    _solve(job, {spec.name: weight}, [spec], inputs.joined(), target=target)


class _Reached(Exception):
    """The stage whose inputs were wanted has them; the rest of the block need not run."""


def _stage_moments(live: LiveBlock, spec: LinearSpec, states: Tensor) -> Moments:
    """Moments of a stage's inputs over all rows, the stages before it already quantized."""
    moments = Moments.zero(spec.shape[0])

    def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0].reshape(-1, inputs[0].shape[-1]))
        raise _Reached

    handle = live.submodule(spec).register_forward_pre_hook(see)
    try:
        for part in batches(states):
            try:
                live(states[part])
            except _Reached:
                continue
            raise RuntimeError(f"{spec.name}: the block never calls {spec.module}")
    finally:
        handle.remove()
    return moments


def _quantize_experts(
    job: QuantizeJob, live: LiveBlock, experts: ExpertsSpec, states: Tensor, output: Tensor
) -> None:
    hidden = states.shape[-1]
    x_path = job.folder / "experts-input.npy"
    with new_states(x_path, (states.shape[0] * states.shape[1], hidden)) as x:
        routing, rows = route(live, states, output, x), token_rows(states)
        stream = _open_stream(job, live.spec.index, experts, routing, output.view(-1, hidden))
        for turn in turns(routing, experts):
            _quantize_expert(job, turn, stream, rows)
            for spec in turn.linears:
                job.progress.step(spec.name)
        stream.close()
    x_path.unlink()


def _open_stream(
    job: QuantizeJob, block: int, experts: ExpertsSpec, routing: Routing, states: Tensor
) -> Stream:
    if not job.repair.repairs(experts.linears[0][2].role):
        return Stream(states)
    goal, shares = open_states(job.original(block + 1)), job.folder / "experts-shares.npy"
    return RepairedStream(
        states, goal.view(-1, goal.shape[-1]), shares, job.model, experts, routing, job.repair
    )


def _quantize_expert(job: QuantizeJob, turn: Turn, stream: Stream, rows: Tensor) -> None:
    """Quantize an expert and let it add to the stream; `rows` [T] has each token's calibration row."""
    seen = turn.part(slice(job.tokens.numel()))
    if todo := job.unfinished((turn.gate, turn.up)):
        inputs, span = SplitMoments.zero(turn.gate.shape[0], prior=True), seen.whole()
        inputs.add(span.x, rows[span.index], span.weight.square())
        inputs.add_prior(seen.routing.x[seen.tokens.others])
        _solve(job, {spec.name: job.model.dense(spec) for spec in todo}, todo, inputs.joined(), inputs.prior)
    gate, up = finished_weight(job, turn.gate), finished_weight(job, turn.up)
    stream.take_turn(turn)
    if todo := job.unfinished((turn.down,)):
        inner = SplitMoments.zero(turn.down.shape[0], prior=True)
        aim = stream.aim(job.model.dense(turn.down), inner)
        for span in seen.spans():
            h = seen.inner(span.x, gate, up)
            inner.add(h, rows[span.index], span.weight.square())
            aim.add(span, h, rows[span.index])
        for x in seen.others():
            inner.add_prior(seen.inner(x, gate, up))
        inner.check(turn.down.name)
        weight, target = aim.finish(job.refit)
        del aim
        _solve(job, {turn.down.name: weight}, todo, inner.joined(), inner.prior, target)
    turn.add_to(stream.states, (gate, up, finished_weight(job, turn.down)))


def _quantize_head(job: QuantizeJob) -> None:
    head = job.model.architecture.head
    if todo := job.unfinished([head]):
        states = job.calibration(open_states(job.states(len(job.model.architecture.blocks))))
        moments = Moments.zero(head.shape[0])
        for part in batches(states):
            moments.add(job.model.final_norm(states[part]).view(-1, states.shape[-1]))
        _solve(job, {head.name: job.model.dense(head)}, todo, moments)
    job.progress.step(head.name)


def _measure_distance(job: QuantizeJob, unseen: Tensor) -> dict[str, Any]:
    """Scores of the unseen rows, from the states after the last blocks and both heads."""
    head, count = job.model.architecture.head, len(job.model.architecture.blocks)

    def logits(states: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        rows = iter(states[-len(unseen) :])
        return lambda _: job.model.final_norm(next(rows)) @ weight.T

    quantized = logits(open_states(job.states(count)), finished_weight(job, head))
    original = logits(open_states(job.original(count)), job.model.dense(head))
    scores = evaluate(quantized, original, unseen).as_dict()
    del scores["router_topk"]
    return scores


def _solve(
    job: QuantizeJob,
    weights: Mapping[str, Tensor],
    specs: Sequence[LinearSpec],
    moments: Moments,
    prior: Moments | None = None,
    target: ResidualTarget | None = None,
) -> None:
    """Quantize linears that share their inputs, and write the file of each as soon as it is solved.

    Args:
        job: where and with what.
        weights: name → [N, K], what is quantized.
        specs: the linears.
        moments: of their inputs.
        prior: of other tokens, for experts.
        target: what a single linear that writes into the residual stream is refitted to.
    """
    groups = {spec.name: parse_groups(job.groups[spec.name]) for spec in specs}
    shrinkage = job.measurement.linears[specs[0].name].shrinkage
    solved = solve_linears(weights, groups, moments, prior, shrinkage, job.effort, job.refit, target)
    for spec, one in zip(specs, solved, strict=True):
        _write_linear(job, spec, one)


def _write_linear(job: QuantizeJob, spec: LinearSpec, solved: Solved) -> None:
    tensors, bias = solved.tensors, load_bias(job.model.checkpoint, spec)
    if bias is not None:
        padded = torch.zeros(padded_columns(spec.shape[1]), dtype=torch.float16)
        padded[: spec.shape[1]] = to_half(bias, f"{spec.name}.bias")
        tensors["bias"] = padded
    named = {f"{spec.name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    facts = {"loss": repr(solved.loss), "energy": repr(solved.energy)}
    save_tensors(job.linear(spec.name), named, facts)


def finished_weight(job: QuantizeJob, spec: LinearSpec) -> Tensor:
    """The float32 weight [N, K] of a linear as its finished file decodes."""
    tensors = load_file(job.linear(spec.name))
    prefix = f"{spec.name}."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dequantize(plain, spec.shape[1]).float().contiguous()
