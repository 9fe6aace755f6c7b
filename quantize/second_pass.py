"""The quantization pass: block by block, each linear solved on inputs that earlier quantized linears produce.

Inside a block the stages follow the data: query, key and value are solved on the block's input, the output
projection on what their quantized weights make of it, and so on; an expert's down projection sees its
quantized gate and up projections. Every finished linear is a file before the next one starts.

The original's states run beside the quantized model's: the linears that write into the residual stream are
changed so that they also repair what the quantized linears before them have spoilt (`repair`). Rows that are
not calibrated on go through both, and tell at the end how far the quantized model is from the original.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.collect import (
    down_moments,
    gate_up_moments,
    head_moments,
    stage_moments,
    stage_residual,
)
from dbrx_quant.calibration.blocks.head import distance
from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.states import new_states, open_states
from dbrx_quant.calibration.blocks.stream import ComparedStream, Stream
from dbrx_quant.calibration.blocks.walk import (
    Turn,
    batches,
    check_states,
    embed_rows,
    route,
    run_dense_block,
    token_rows,
    turns,
)
from dbrx_quant.quantize.measurement import Measurement
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.linear import Solver
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, NO_REPAIR, Repair
from dbrx_quant.runtime.families.facts import BlockSpec, ExpertsSpec, LinearSpec, load_bias
from dbrx_quant.runtime.files.atomic import write_json
from dbrx_quant.runtime.folder.linear_files import LinearFiles
from dbrx_quant.runtime.progress import Progress


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

    def shared(self, block: int) -> Path:
        """The original's hidden states after a block's shared expert, before its routed ones."""
        return self.folder / f"shared-{block:03}.npy"

    def goal(self, block: BlockSpec, role: str) -> Path:
        """The original's states that a linear outside of routed experts brings the stream nearer to."""
        if role == "o":
            return self.middle(block.index)
        return self.shared(block.index) if block.experts else self.original(block.index + 1)

    @property
    def distance(self) -> Path:
        """The distance to the original, measured."""
        return self.folder / "distance.json"

    @property
    def linears(self) -> LinearFiles:
        """The finished linears."""
        return LinearFiles(self.folder / "linears")

    @property
    def solver(self) -> Solver:
        """What quantizes and writes linears."""
        measured = self.measurement.linears
        return Solver(
            self.linears, self.groups, lambda name: measured[name].shrinkage, self.effort, self.refit
        )

    def dense(self, specs: Sequence[LinearSpec]) -> list[Tensor]:
        """The dense weights of some linears."""
        return [self.model.dense(spec) for spec in specs]

    def biases(self, specs: Sequence[LinearSpec]) -> list[Tensor | None]:
        """The biases of some linears."""
        return [load_bias(self.model.checkpoint, spec) for spec in specs]

    @property
    def next_block(self) -> int:
        """The first block that is not finished: the last one that there are states before."""
        count = len(self.model.architecture.blocks)
        return max((i for i in range(count + 1) if self.states(i).exists()), default=0)


def quantize_model(job: QuantizeJob) -> dict[str, Any] | None:
    """Solve every linear of the model that has no file yet.

    Returns:
        The distance to the original on the unseen rows (`evaluation.scores`), None without any.
    """
    blocks = job.model.architecture.blocks
    with torch.no_grad():
        first = job.next_block
        if not job.states(first).exists():
            if job.original_tokens is not None:
                embed_rows(job.model, job.original_tokens, job.original(0))
            embed_rows(job.model, job.all_tokens, job.states(0))
        for block in blocks[:first]:
            for spec in block.linears():
                job.progress.step(spec.name)
        for block in blocks[first:]:
            _quantize_block(job, block.index)
            job.states(block.index).unlink()  # the next block's states are on disk by now
            for path in (job.original(block.index), job.middle(block.index), job.shared(block.index)):
                path.unlink(missing_ok=True)
        _quantize_head(job)
        if job.unseen is not None and not job.distance.exists():
            states, original = (open_states(path(len(blocks))) for path in (job.states, job.original))
            head, count = job.linears.weight(job.model.architecture.head), len(job.unseen)
            scores = distance(job.model, states[-count:], original[-count:], head, job.unseen).as_dict()
            write_json(job.distance, {k: v for k, v in scores.items() if k != "router_topk"})
        job.original(len(blocks)).unlink(missing_ok=True)
    return json.loads(job.distance.read_text(encoding="utf-8")) if job.unseen is not None else None


def _quantize_block(job: QuantizeJob, index: int) -> None:
    if job.original_tokens is not None:
        _run_original(job, index)
    live = job.model.block(index)
    states = open_states(job.states(index))
    for stage in live.spec.stages:
        if todo := job.linears.unfinished(stage):
            _quantize_stage(job, live, todo, job.calibration(states))
        live.install({spec.name: job.linears.weight(spec) for spec in stage})
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
    block = job.model.architecture.blocks[index]
    paths = [job.original(index + 1), job.middle(index)]
    if block.experts and not block.only_routed:
        paths.append(job.shared(index))
    if all(path.exists() for path in paths):
        return
    states, scratch = open_states(job.original(index)), job.folder / "experts-input.npy"
    with ExitStack() as opened:
        filled = [opened.enter_context(new_states(path, tuple(states.shape))) for path in paths]
        run_dense_block(job.model, index, states, filled[0], filled[1], filled[-1], scratch)


def _quantize_stage(job: QuantizeJob, live: LiveBlock, specs: Sequence[LinearSpec], states: Tensor) -> None:
    """Quantize linears outside of experts that share their inputs, from states [R, L, D] before the block."""
    spec = specs[0]
    if not job.repair.repairs(spec.role):
        moments = stage_moments(live, spec, states)
        job.solver.solve(specs, job.dense(specs), job.biases(specs), moments)
        return
    goal = open_states(job.goal(live.spec, spec.role))
    residual = stage_residual(live, spec, states, goal)
    weight, target = job.repair.aim(job.model.dense(spec), residual, job.refit)
    inputs = residual.inputs
    del residual  # big, and used up
    job.solver.solve(specs, [weight], job.biases(specs), inputs.joined(), target=target)


def _quantize_experts(
    job: QuantizeJob, live: LiveBlock, experts: ExpertsSpec, states: Tensor, output: Tensor
) -> None:
    hidden, x_path = states.shape[-1], job.folder / "experts-input.npy"
    with new_states(x_path, (states.shape[0] * states.shape[1], hidden)) as x:
        routing, rows = route(live, states, output, x), token_rows(states)
        stream = Stream(output.view(-1, hidden))
        if job.repair.repairs("down"):
            goal = open_states(job.original(live.spec.index + 1)).view(-1, hidden)
            shares = job.folder / "experts-shares.npy"
            stream = ComparedStream(stream.states, goal, shares, job.model, experts, routing)
        for turn in turns(routing, experts):
            _quantize_expert(job, turn, stream, rows)
            for spec in turn.linears:
                job.progress.step(spec.name)
        stream.close()
    x_path.unlink()


def _quantize_expert(job: QuantizeJob, turn: Turn, stream: Stream, rows: Tensor) -> None:
    """Quantize an expert and let it add to the stream; `rows` [T] has each token's calibration row."""
    seen, linears = turn.part(slice(job.tokens.numel())), job.linears
    if todo := linears.unfinished((turn.gate, turn.up)):
        inputs = gate_up_moments(seen, rows)
        job.solver.solve(todo, job.dense(todo), job.biases(todo), inputs.joined(), inputs.prior)
    gate, up = linears.weight(turn.gate), linears.weight(turn.up)
    stream.take_turn(turn)
    if todo := linears.unfinished((turn.down,)):
        dense = job.model.dense(turn.down)
        residual = down_moments(seen, gate, up, dense, stream, rows)
        weight, target = job.repair.aim(dense, residual, job.refit)
        inner = residual.inputs
        del residual, dense  # big, and used up
        job.solver.solve(todo, [weight], job.biases(todo), inner.joined(), inner.prior, target)
    turn.add_to(stream.states, (gate, up, linears.weight(turn.down)))


def _quantize_head(job: QuantizeJob) -> None:
    head = job.model.architecture.head
    if todo := job.linears.unfinished([head]):
        states = job.calibration(open_states(job.states(len(job.model.architecture.blocks))))
        moments = head_moments(job.model, states)
        job.solver.solve(todo, job.dense(todo), job.biases(todo), moments)
    job.progress.step(head.name)
