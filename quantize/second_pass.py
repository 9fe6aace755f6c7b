"""The quantization pass: block by block, each linear solved on inputs that earlier quantized linears produce.

Inside a block the stages follow the data: query, key and value are solved on the block's input, the output
projection on what their quantized weights make of it, and so on; an expert's down projection sees its
quantized gate and up projections, and no expert anything of another one. Every finished linear is a file
before the next one starts.

The original's states run beside the quantized model's: the linears that write into the residual stream are
changed so that they also repair what the quantized linears before them have spoilt (`repair`). Rows that are
not calibrated on go through both, and tell at the end how far the quantized model is from the original.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Alone, Crew
from dbrx_quant.calibration.blocks.head import distance
from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.shares import DenseShares, Missing, add_shares, shared_out
from dbrx_quant.calibration.blocks.stages import Goals, HeadStage, Stage, block_stages
from dbrx_quant.calibration.blocks.states import States, new_states, open_states, scratch
from dbrx_quant.calibration.blocks.walk import (
    batches,
    check_states,
    embed_rows,
    route,
    run_dense_block,
    turns,
)
from dbrx_quant.quantize.entries import REMEDY
from dbrx_quant.quantize.measurement import Measurement
from dbrx_quant.quantize.solve.expert import SolvedExperts
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.linear import Solver
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, Repair
from dbrx_quant.quantize.solve.stage import StageSolver
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.files.json_file import VERSION_KEY, JsonFile
from dbrx_quant.runtime.files.sealed import remove
from dbrx_quant.runtime.output.progress import Progress
from dbrx_quant.runtime.shards.filling import FillingShards
from dbrx_quant.runtime.shards.linear_files import LinearFiles

_DISTANCE = JsonFile("a distance to the original", version=1, remedy=REMEDY, sealed=True)


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
        held_out: [H, L] int64 token ids that measure the distance to the original; None: it is not measured.
        refit: whether the maxima of each linear's groups are fitted once more when its codes are fixed.
        shards: of the result, which finished linears move into; None: they stay files in the folder.
        crew: who takes the experts.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    measurement: Measurement
    groups: Mapping[str, str]
    progress: Progress
    effort: Effort = "default"
    repair: Repair = DEFAULT_REPAIR
    held_out: Tensor | None = None
    refit: bool = False
    shards: FillingShards | None = None
    crew: Crew = field(default_factory=Alone)

    @property
    def all_tokens(self) -> Tensor:
        """[R + H, L]: the rows of all states, those to calibrate on first."""
        return self.tokens if self.held_out is None else torch.cat([self.tokens, self.held_out])

    @property
    def original_tokens(self) -> Tensor | None:
        """The rows that are followed through the original too: all for the repair, else the held-out ones."""
        return self.all_tokens if self.repair.needs_original else self.held_out

    def calibration(self, states: States) -> States:
        """The part of states that is calibrated on."""
        return states.part(slice(len(self.tokens)))

    def states(self, block: int) -> Path:
        """Hidden states before a block, as the quantized blocks before it make them."""
        return self.folder / f"states-{block:03}.safetensors"

    def original(self, block: int) -> Path:
        """The original's hidden states before a block."""
        return self.folder / f"original-{block:03}.safetensors"

    def middle(self, block: int) -> Path:
        """The original's hidden states after a block's attention."""
        return self.folder / f"middle-{block:03}.safetensors"

    def shared(self, block: int) -> Path:
        """The original's hidden states after a block's shared expert, before its routed ones."""
        return self.folder / f"shared-{block:03}.safetensors"

    @property
    def distance(self) -> Path:
        """The distance to the original, measured."""
        return self.folder / "distance.json"

    @property
    def linears(self) -> LinearFiles:
        """The finished linears."""
        return LinearFiles(self.folder / "linears") if self.shards is None else self.shards

    @property
    def stages(self) -> StageSolver:
        """What quantizes and writes linears."""
        measured = self.measurement.linears
        solver = Solver(
            self.linears, self.groups, lambda name: measured[name].shrinkage, self.effort, self.refit
        )
        return StageSolver(self.model, solver, self.repair)

    @property
    def next_block(self) -> int:
        """The first block that is not finished: the last one that there are states before.

        The first of all where the work of an earlier one is not whole.
        """
        blocks = self.model.architecture.blocks
        block = max((i for i in range(len(blocks) + 1) if self.states(i).exists()), default=0)
        compared = self.original_tokens is not None and not (block == len(blocks) and self.measured)
        whole = self.original(block).exists() or not compared
        before = [spec for earlier in blocks[:block] for spec in earlier.linears()]
        return block if whole and not self.linears.unfinished(before) else 0

    @property
    def measured(self) -> bool:
        """Whether the distance to the original is known, or nobody asks for it."""
        return self.held_out is None or self.distance.exists()

    @property
    def embedded(self) -> bool:
        """Whether the states before the first block are there."""
        original = self.original_tokens is None or self.original(0).exists()
        return original and self.states(0).exists()

    def discard_states(self) -> None:
        """Remove the states of all blocks."""
        for path in self.folder.glob("*-???.safetensors"):
            remove(path)


def quantize_model(job: QuantizeJob) -> dict[str, Any] | None:
    """Solve every linear of the model that is not finished yet.

    Returns:
        The distance to the original on the held-out rows (`evaluation.scores`), None without any.
    """
    blocks = job.model.architecture.blocks
    with torch.no_grad():
        first = job.next_block
        if first == 0 and not job.embedded:
            job.discard_states()  # of later blocks, whose work is not whole
            if job.original_tokens is not None:
                embed_rows(job.model, job.original_tokens, job.original(0))
            embed_rows(job.model, job.all_tokens, job.states(0))
        for block in blocks[:first]:
            for spec in block.linears():
                job.progress.step(spec.name)
        for block in blocks[first:]:
            _quantize_block(job, block.index)
            remove(job.states(block.index))  # the next block's states are on disk by now
            for path in (job.original(block.index), job.middle(block.index), job.shared(block.index)):
                remove(path)
        device = job.model.device
        ends = open_states(job.states(len(blocks)), device)
        _quantize_stage(job, HeadStage(job.model, job.calibration(ends)))
        if not job.measured:
            assert job.held_out is not None
            original, last = open_states(job.original(len(blocks)), device), slice(-len(job.held_out), None)
            head = job.linears.weight(job.model.architecture.head).to(device)
            dense = job.model.dense(job.model.architecture.head)
            states, goals = ends.part(last), original.part(last)
            scores = distance(job.model, states, goals, head, dense, job.held_out).as_dict()
            _DISTANCE.write(job.distance, {k: v for k, v in scores.items() if k != "router_topk"})
        remove(job.original(len(blocks)))
    return _read_distance(job.distance) if job.held_out is not None else None


def _read_distance(path: Path) -> dict[str, Any]:
    fields = _DISTANCE.read(path)
    return {name: value for name, value in fields.values.items() if name != VERSION_KEY}


def _quantize_block(job: QuantizeJob, index: int) -> None:
    goals = _run_original(job, index) if job.original_tokens is not None else None
    states = open_states(job.states(index), job.model.device)
    with new_states(job.states(index + 1), states.shape) as output:
        live = job.model.block(index)
        compared = goals if job.repair.needs_original else None
        for stage in block_stages(live, job.model, job.calibration(states), compared):
            _quantize_stage(job, stage)
        if live.spec.experts is None:
            for part in batches(states):
                output[part] = live(states[part])[0]
        else:
            _quantize_experts(job, live, live.spec.experts, states, output, compared)
        check_states(output, f"output of quantized block {index}")


def _quantize_experts(
    job: QuantizeJob,
    live: LiveBlock,
    experts: ExpertsSpec,
    states: States,
    output: Tensor,
    goals: Goals | None,
) -> None:
    """Quantize a block's experts; `output` [R, L, D] is filled with the states after it."""
    tokens, calibrated = states.shape[0] * states.shape[1], job.tokens.numel()
    x, stream = scratch(job.folder, (tokens, states.shape[-1])), output.view(tokens, -1)
    routing, index, missing = route(live, states, output, x), live.spec.index, None
    if goals is not None:
        goal = open_states(goals.after).flat.part(slice(calibrated))
        dense = DenseShares(job.model, index, routing, calibrated, job.folder)
        shares = job.crew.each(dense, turns(routing, experts))
        missing = Missing.behind(shares, routing.weight[:calibrated], stream, goal, job.folder)
    length = states.shape[1]
    task = SolvedExperts(job.stages, index, experts, routing, length, calibrated, missing, job.folder)
    under_way = {spec.name for linears in experts.linears for spec in linears}
    for turn, result in job.crew.each(task, turns(routing, experts)):
        add_shares(stream, turn, States.of(result))
        under_way.difference_update(spec.name for spec in turn.linears)
        _finished(job, turn.linears, under_way)


def _run_original(job: QuantizeJob, index: int) -> Goals:
    """Write the original's states in the middle of a block and after it, unless they are there."""
    block = job.model.architecture.blocks[index]
    shared = job.shared(index) if block.experts and not block.only_routed else None
    goals = Goals(job.middle(index), shared, job.original(index + 1))
    paths = [path for path in (goals.after, goals.middle, goals.shared) if path]
    if not all(path.exists() for path in paths):
        states = open_states(job.original(index), job.model.device)
        with ExitStack() as opened:
            after, middle, *more = (opened.enter_context(new_states(path, states.shape)) for path in paths)
            between, add = more[0] if more else None, shared_out(job.crew, index, job.folder)
            run_dense_block(job.model, index, states, after, job.folder, middle, between, add)
    return goals


def _quantize_stage(job: QuantizeJob, stage: Stage) -> None:
    job.stages.quantize(stage)
    _finished(job, stage.specs)


def _finished(job: QuantizeJob, specs: Sequence[LinearSpec], under_way: Collection[str] = ()) -> None:
    """Tell of finished linears, and write the shards that they fill, but for those that others work on."""
    if job.shards is not None:
        job.shards.fill(under_way)
    for spec in specs:
        job.progress.step(spec.name)
