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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_quant.calibration.experts import (
    activation,
    expert_inner,
    expert_output,
    tokens_of,
)
from dbrx_quant.calibration.hessian import Moments, Shrinkage, SplitMoments, hessian
from dbrx_quant.calibration.passes import (
    DenseShares,
    batches,
    check_states,
    dense_shares,
    route,
    token_rows,
    token_spans,
)
from dbrx_quant.calibration.states import new_states, open_states
from dbrx_quant.calibration.streamed import LiveBlock, StreamedModel
from dbrx_quant.quantize.curve import Prepared, prepare, sampled_energy
from dbrx_quant.quantize.ldlq import Effort, quantize_matrix
from dbrx_quant.quantize.progress import Progress
from dbrx_quant.quantize.recipe import parse_groups
from dbrx_quant.quantize.refit import Lacking, loss_of, refitted, wanted
from dbrx_quant.quantize.repair import DEFAULT_REPAIR, REPAIRED, Repair, RepairMoments, repaired
from dbrx_quant.runtime import _native
from dbrx_quant.runtime.evaluate import evaluate
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec, load_bias, to_half
from dbrx_quant.runtime.files import save_tensors, write_json
from dbrx_quant.runtime.format import (
    Group,
    GroupMap,
    UnpackedLinear,
    pack_linear,
    padded_columns,
    write_groups,
)
from dbrx_quant.runtime.ops import dequantize


@dataclass(frozen=True)
class QuantizeJob:
    """Where a quantization works and with what.

    Attributes:
        model: the source.
        tokens: [R, L] int64 token ids to calibrate on.
        folder: for finished linears and the states between blocks.
        measurement: from `measure`.
        groups: linear → group map as text.
        progress: told of every finished linear.
        effort: of the solver.
        repair: how linears that write into the residual stream make good what it has lost; None: they do not.
        unseen: [U, L] int64 token ids that measure the distance to the original; None: it is not measured.
        refit: whether the maxima of each linear's groups are fitted once more when its codes are fixed.
    """

    model: StreamedModel
    tokens: Tensor
    folder: Path
    measurement: Mapping[str, Any]
    groups: Mapping[str, str]
    progress: Progress
    effort: Effort = "default"
    repair: Repair | None = DEFAULT_REPAIR
    unseen: Tensor | None = None
    refit: bool = False

    @property
    def all_tokens(self) -> Tensor:
        """[R + U, L]: the rows of all states, those to calibrate on first."""
        return self.tokens if self.unseen is None else torch.cat([self.tokens, self.unseen])

    @property
    def original_tokens(self) -> Tensor | None:
        """The rows that are followed through the original too: all for the repair, else those not seen."""
        return self.all_tokens if self.repair else self.unseen

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

    def shrinkage(self, name: str) -> Shrinkage:
        """What the measurement chose on held-out tokens."""
        entry = self.measurement["linears"][name]
        return Shrinkage(entry["damping"], entry["prior"])


def quantize_model(job: QuantizeJob) -> dict[str, Any] | None:
    """Solve every linear of the model that has no file yet.

    Returns:
        The distance to the original on the unseen rows (`runtime.evaluate.Scores`), None without any.
    """
    (job.folder / "linears").mkdir(parents=True, exist_ok=True)
    blocks = job.model.architecture.blocks
    with torch.no_grad():
        if not any(job.states(i).exists() for i in range(len(blocks) + 1)):
            if job.original_tokens is not None:
                _embed(job, job.original_tokens, job.original(0))
            _embed(job, job.all_tokens, job.states(0))
        for block in blocks:
            if not any(job.states(i).exists() for i in range(block.index + 1, len(blocks) + 1)):
                _quantize_block(job, block.index)
                job.states(block.index).unlink()  # the next block's states are on disk by now
                for path in (job.original(block.index), job.middle(block.index)):
                    path.unlink(missing_ok=True)
            else:
                for spec in block.linears():
                    job.progress.step(spec.name)
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
        todo = [spec for spec in stage if not job.linear(spec.name).exists()]
        if todo and job.repair and stage[0].role in REPAIRED:
            _repair_and_solve(job, job.repair, live, stage[0], job.calibration(states))
        elif todo:
            moments = _stage_moments(live, stage[0], job.calibration(states))
            _solve(job, todo, moments, None, {s.name: job.model.dense(s) for s in todo})
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
            for at, share in dense_shares(job.model, experts, routing):
                output.view(-1, hidden)[at] += share
        x_path.unlink()


def _repair_and_solve(
    job: QuantizeJob, repair: Repair, live: LiveBlock, spec: LinearSpec, states: Tensor
) -> None:
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
    dense = job.model.dense(spec)
    weight = repaired(dense, moments, repair)
    lacking = Lacking(dense, moments.fit.add_(moments.held)) if job.refit else None
    del moments, dense
    _solve(job, [spec], inputs.joined(), None, {spec.name: weight}, lacking)


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
        routing = route(live, states, output, x)
        flat, act, rows = output.view(-1, hidden), activation(experts.activation), token_rows(states)
        unquantized = None
        if job.repair:
            shares = job.folder / "experts-shares.npy"
            unquantized = DenseShares(shares, job.model, experts, routing, flat)
        goal = open_states(job.original(live.spec.index + 1)).view(-1, hidden) if job.repair else None
        calibration = routing.part(slice(job.tokens.numel()))
        for expert, (gate, up, down) in enumerate(experts.linears):
            everyone, tokens = tokens_of(routing, expert), tokens_of(calibration, expert)
            square = tokens.weight.square()
            todo = [spec for spec in (gate, up) if not job.linear(spec.name).exists()]
            if todo:
                inputs = SplitMoments.zero(hidden, prior=True)
                inputs.add(x[tokens.index], rows[tokens.index], square)
                _prior(inputs).add(x[tokens.others])
                dense = {spec.name: job.model.dense(spec) for spec in todo}
                _solve(job, todo, inputs.joined(), inputs.prior, dense)
            weights = (finished_weight(job, gate), finished_weight(job, up))
            if unquantized:
                unquantized.take_away(everyone)
            if not job.linear(down.name).exists():
                inner = SplitMoments.zero(down.shape[0], prior=True)
                weight = job.model.dense(down)
                moments = RepairMoments(inner, *down.shape) if job.repair else None
                for part in token_spans(len(tokens.index)):
                    at, p = tokens.index[part], tokens.weight[part]
                    h = expert_inner(x[at], *weights, act)
                    inner.add(h, rows[at], square[part])
                    if moments and goal is not None:
                        missing = goal[at] - flat[at] - p[:, None] * (h @ weight.T)
                        moments.add(h, missing, rows[at], p)
                for part in token_spans(len(tokens.others)):
                    _prior(inner).add(expert_inner(x[tokens.others[part]], *weights, act))
                inner.check(down.name)
                lacking = None
                if moments and job.repair:
                    unrepaired, weight = weight, repaired(weight, moments, job.repair)
                    lacking = Lacking(unrepaired, moments.fit.add_(moments.held)) if job.refit else None
                    del moments, unrepaired
                _solve(job, [down], inner.joined(), inner.prior, {down.name: weight}, lacking)
            last = finished_weight(job, down)
            for part in token_spans(len(everyone.index)):
                at = everyone.index[part]
                flat[at] += everyone.weight[part, None] * expert_output(x[at], (*weights, last), act)
            for spec in (gate, up, down):
                job.progress.step(spec.name)
        if unquantized:
            unquantized.close()
    x_path.unlink()


def _prior(moments: SplitMoments) -> Moments:
    assert moments.prior is not None
    return moments.prior


def _quantize_head(job: QuantizeJob) -> None:
    head = job.model.architecture.head
    if not job.linear(head.name).exists():
        states = job.calibration(open_states(job.states(len(job.model.architecture.blocks))))
        moments = Moments.zero(head.shape[0])
        for part in batches(states):
            moments.add(job.model.final_norm(states[part]).view(-1, states.shape[-1]))
        _solve(job, [head], moments, None, {head.name: job.model.dense(head)})
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
    specs: list[LinearSpec],
    moments: Moments,
    prior: Moments | None,
    weights: Mapping[str, Tensor],
    lacking: Lacking | None = None,
) -> None:
    """Quantize linears that share their inputs, and write each one's file.

    A file's metadata has the `loss` tr(E^T H E) and the `energy` tr(W^T H W), to which reports relate it.
    What the stream lacks is for the refit of a single linear that writes into it.
    """
    moments.check(specs[0].name)
    shrinkage = job.shrinkage(specs[0].name)
    matrix = hessian(moments, prior, shrinkage)
    energies = {spec.name: sampled_energy(weights[spec.name], matrix) for spec in specs}
    prepared = prepare(matrix)
    del matrix
    for spec in specs:
        weight = weights[spec.name]
        tensors, loss = solve_linear(weight, prepared, parse_groups(job.groups[spec.name]), job.effort)
        if job.refit:
            matrix = hessian(moments, prior, replace(shrinkage, damping=0.0))
            goal = wanted(weight, matrix, lacking, moments, prior, shrinkage)
            tensors["q_scale_max"] = refitted(tensors, matrix, goal)
            del matrix, goal
            loss = loss_of(tensors, weight, hessian(moments, prior, shrinkage))
        bias = load_bias(job.model.checkpoint, spec)
        if bias is not None:
            padded = torch.zeros(padded_columns(spec.shape[1]), dtype=torch.float16)
            padded[: spec.shape[1]] = to_half(bias, f"{spec.name}.bias")
            tensors["bias"] = padded
        named = {f"{spec.name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        facts = {"loss": repr(loss), "energy": repr(energies[spec.name])}
        save_tensors(job.linear(spec.name), named, facts)


def solve_linear(
    weight: Tensor, prepared: Prepared, groups: GroupMap, effort: Effort = "default"
) -> tuple[dict[str, Tensor], float]:
    """Quantize one linear and pack it.

    Args:
        weight: [N, K] float32.
        prepared: its Hessian's order and factor.
        groups: its group map.
        effort: of the solver.

    Returns:
        Its tensors as stored (N padded to a multiple of 32), and tr(E^T H E).
    """
    n = weight.shape[0]
    missing = padded_columns(n) - n
    ordered = torch.nn.functional.pad(weight.T[prepared.permutation], (0, missing))
    solved = quantize_matrix(ordered, prepared.factor, groups, effort=effort)
    unpacked = UnpackedLinear(
        solved.codes, solved.scale_codes, solved.scale_max, groups, prepared.permutation
    )
    return pack_linear(unpacked, _pack_codes), solved.loss


def _pack_codes(codes: Tensor, groups: Sequence[Group]) -> Tensor:
    return _native.pack_codes(codes, write_groups(groups), sum(group.word_rows for group in groups))


def finished_weight(job: QuantizeJob, spec: LinearSpec) -> Tensor:
    """The float32 weight [N, K] of a linear as its finished file decodes."""
    tensors = load_file(job.linear(spec.name))
    prefix = f"{spec.name}."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dequantize(plain, spec.shape[1]).float().contiguous()
