"""Moments of a block's linears while it is being quantized, the stages before them quantized already.

Axes: T tokens, K input channels, N output channels.
"""

from typing import Any

from torch import Tensor

from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.stream import Stream
from dbrx_quant.calibration.blocks.walk import Turn, batches, token_rows
from dbrx_quant.calibration.statistics.moments import Moments, SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.runtime.families.facts import LinearSpec


class _Reached(Exception):
    """The stage whose inputs are asked for has them; the rest of the block need not run."""


def stage_moments(live: LiveBlock, spec: LinearSpec, states: Tensor) -> Moments:
    """Moments of a stage's inputs over all rows of states.

    Args:
        live: the block.
        spec: a linear of the stage.
        states: [R, L, D] before the block.
    """
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


def stage_residual(live: LiveBlock, spec: LinearSpec, states: Tensor, goal: Tensor) -> ResidualMoments:
    """What the stream misses of `goal` [R, L, N] behind a linear that writes into it, outside of experts.

    The linear's inputs are summed up beside it. An attention output is held against the stream before the
    feed-forward part, a down projection against the stream behind it.
    """
    attention = spec.role == "o"
    rows, seen = token_rows(states).view(states.shape[:2]), list[Tensor]()
    inputs = SplitMoments.zero(spec.shape[0])
    moments = ResidualMoments(inputs, *spec.shape)
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
    return moments


def gate_up_moments(turn: Turn, rows: Tensor) -> SplitMoments:
    """Moments of what an expert's gate and up get; `rows` [T] has each token's calibration row."""
    inputs, span = SplitMoments.zero(turn.gate.shape[0], prior=True), turn.whole()
    inputs.add(span.x, rows[span.index], span.weight.square())
    inputs.add_prior(turn.routing.x[turn.tokens.others])
    return inputs


def down_moments(
    turn: Turn, gate: Tensor, up: Tensor, dense: Tensor, stream: Stream, rows: Tensor
) -> ResidualMoments:
    """Moments of what an expert's down projection gets, and what the stream misses at its turn.

    Args:
        turn: the expert's, with the tokens to calibrate on.
        gate: [N, K] its quantized weight.
        up: [N, K] its quantized weight.
        dense: [N, K] of the down projection.
        stream: that the expert adds to.
        rows: [T] each token's calibration row.
    """
    inner = SplitMoments.zero(turn.down.shape[0], prior=True)
    residual = stream.residual(dense, inner)
    for span in turn.spans():
        h = turn.inner(span.x, gate, up)
        inner.add(h, rows[span.index], span.weight.square())
        stream.miss(residual, dense, span, h, rows[span.index])
    for x in turn.others():
        inner.add_prior(turn.inner(x, gate, up))
    inner.check(turn.down.name)
    return residual


def head_moments(model: StreamedModel, states: Tensor) -> Moments:
    """Moments of the head's inputs, from states [R, L, D] after the last block."""
    moments = Moments.zero(states.shape[-1])
    for part in batches(states):
        moments.add(model.final_norm(states[part]).view(-1, states.shape[-1]))
    return moments
