"""A block's linears stage by stage, in the order of the data, for whoever gives them new weights.

    for stage in (*block_stages(...), *expert_stages(...)):
        dense, inputs, residual = stage.collect(stage.specs)
        ...                                    # new weights of its linears
        stage.finish(weight_of)                # which all stages after it see

A stage is finished before the next one is asked for. Its linears share their inputs.

Axes: R rows, L tokens of a row, T tokens, D hidden, K input channels, N output channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.shares import Missing, shares_of
from dbrx_quant.calibration.blocks.states import States, open_states
from dbrx_quant.calibration.blocks.walk import Turn, batches, token_rows
from dbrx_quant.calibration.statistics.moments import Moments, SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.kernels.float_matmul import narrowed, product

WeightOf = Callable[[LinearSpec], Tensor]  # the float32 weight [N, K] of a linear


class Collected(NamedTuple):
    """What is known of some linears before they get new weights.

    Attributes:
        dense: their weights in the source, float32 [N, K].
        inputs: moments of their inputs.
        residual: what the stream misses of the original's behind a linear that writes into it, if known.
    """

    dense: list[Tensor]
    inputs: Moments | SplitMoments
    residual: ResidualMoments | None = None


@dataclass(frozen=True)
class Goals:
    """Files of the original's states of a block, [R, L, D].

    Attributes:
        middle: after attention.
        shared: after a shared expert, before the routed ones; None in blocks without one.
        after: after the block.
    """

    middle: Path
    shared: Path | None
    after: Path

    def behind(self, spec: LinearSpec, device: torch.device) -> States:
        """The states right behind a linear outside of routed experts that writes into the stream."""
        return open_states(self.middle if spec.role == "o" else self.shared or self.after, device)


class Stage(ABC):
    """Linears that share their inputs.

    Attributes:
        model: for their dense weights.
        specs: the linears.
    """

    def __init__(self, model: StreamedModel, specs: Sequence[LinearSpec]) -> None:
        self.model, self.specs = model, specs

    def collect(self, specs: Sequence[LinearSpec]) -> Collected:
        """What is known of some of its linears."""
        dense = [self.model.dense(spec) for spec in specs]
        return Collected(dense, *self._look(dense))

    @abstractmethod
    def finish(self, weight_of: WeightOf) -> None:
        """Continue with these weights, on the host, of all its linears."""

    @abstractmethod
    def _look(self, dense: Sequence[Tensor]) -> tuple[Moments | SplitMoments, ResidualMoments | None]:
        """Moments of the inputs, and what the stream misses, if known; `dense` are the source's weights."""

    def _narrowed(self, weight_of: WeightOf, spec: LinearSpec) -> Tensor:
        return narrowed(weight_of(spec).to(self.model.device))


class HeadStage(Stage):
    """The head; `states` [R, L, D] are after the last block."""

    def __init__(self, model: StreamedModel, states: States) -> None:
        super().__init__(model, [model.architecture.head])
        self._states = states

    def finish(self, weight_of: WeightOf) -> None:
        """Nothing comes after the head."""

    def _look(self, dense: Sequence[Tensor]) -> tuple[Moments, None]:
        moments = Moments.zero(self._states.shape[-1], self.model.device)
        for part in batches(self._states):
            moments.add(self.model.final_norm(self._states[part]).view(-1, self._states.shape[-1]))
        return moments, None


class _Reached(Exception):
    """The stage whose inputs are asked for has them; the rest of the block need not run."""


class DenseStage(Stage):
    """Linears outside of routed experts; `states` [R, L, D] are before the block."""

    def __init__(
        self, model: StreamedModel, specs: Sequence[LinearSpec], live: LiveBlock, states: States
    ) -> None:
        super().__init__(model, specs)
        self._live, self._states = live, states

    def finish(self, weight_of: WeightOf) -> None:
        """Install the weights in the block."""
        self._live.install({spec.name: weight_of(spec) for spec in self.specs})

    def _look(self, dense: Sequence[Tensor]) -> tuple[Moments | SplitMoments, ResidualMoments | None]:
        spec = self.specs[0]
        moments = Moments.zero(spec.shape[0], self._live.device)

        def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
            moments.add(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _Reached

        handle = self._live.submodule(spec).register_forward_pre_hook(see)
        try:
            for part in batches(self._states):
                try:
                    self._live(self._states[part])
                except _Reached:
                    continue
                raise RuntimeError(f"{spec.name}: the block never calls {spec.module}")
        finally:
            handle.remove()
        return moments, None


class ComparedStage(DenseStage):
    """A linear outside of routed experts that writes into the stream, compared with the original's."""

    def __init__(
        self, model: StreamedModel, specs: Sequence[LinearSpec], live: LiveBlock, states: States, goal: States
    ) -> None:
        super().__init__(model, specs, live, states)
        self._goal = goal

    def _look(self, dense: Sequence[Tensor]) -> tuple[SplitMoments, ResidualMoments]:
        (spec,) = self.specs
        live, states = self._live, self._states
        rows, seen = token_rows(states).view(states.shape[:2]), list[Tensor]()
        inputs = SplitMoments.zero(spec.shape[0], device=live.device)
        residual = ResidualMoments(inputs, *spec.shape)
        handle = live.submodule(spec).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            for part in batches(states):
                output = live.without_mlp(states[part]) if spec.role == "o" else live(states[part])[0]
                x, token_row = seen.pop().flatten(0, -2), rows[part].flatten()
                inputs.add(x, token_row)
                residual.add(x, (self._goal[part] - output).flatten(0, 1), token_row)
        finally:
            handle.remove()
        inputs.check(spec.name)
        return inputs, residual


class GateUpStage(Stage):
    """Gate and up of an expert.

    Attributes:
        turn: the expert's, with the tokens to calibrate on.
        rows: [T] each token's calibration row.
        gate: its new weight, once the stage is finished.
        up: likewise.
    """

    def __init__(self, model: StreamedModel, turn: Turn, rows: Tensor) -> None:
        super().__init__(model, (turn.gate, turn.up))
        self.turn, self.rows = turn, rows

    def finish(self, weight_of: WeightOf) -> None:
        """Keep the weights for the down projection."""
        self.gate, self.up = (self._narrowed(weight_of, spec) for spec in self.specs)

    def _look(self, dense: Sequence[Tensor]) -> tuple[SplitMoments, None]:
        inputs = SplitMoments.zero(self.turn.gate.shape[0], prior=True, device=self.model.device)
        for span in self.turn.spans():
            inputs.add(span.x, self.rows[span.index], span.weight.square())
        for x in self.turn.others():
            inputs.add_prior(x)
        return inputs, None


class DownStage(Stage):
    """The down projection of an expert, behind its gate and up.

    Args:
        before: the stage before, finished.
        turn: the expert's, with all tokens.
        missing: what the stream misses behind the experts, if it is compared with the original's.
    """

    def __init__(self, before: GateUpStage, turn: Turn, missing: Missing | None) -> None:
        super().__init__(before.model, (turn.down,))
        self._before, self._turn, self._missing = before, turn, missing

    def finish(self, weight_of: WeightOf) -> None:
        """Keep the weight for the shares."""
        self._weights = self._before.gate, self._before.up, self._narrowed(weight_of, self._turn.down)

    def shares(self, folder: Path) -> States:
        """What the expert adds to the stream, once the stage is finished; `folder` is for their file."""
        return shares_of(self._turn, self._weights, folder)

    def _look(self, dense: Sequence[Tensor]) -> tuple[SplitMoments, ResidualMoments | None]:
        turn, gate, up = self._before.turn, self._before.gate, self._before.up
        inputs = SplitMoments.zero(turn.down.shape[0], prior=True, device=self.model.device)
        compared = None
        if self._missing:
            compared = self._missing, ResidualMoments(inputs, *turn.down.shape), narrowed(dense[0])
        for span in turn.spans():
            h, rows = turn.inner(span.x, gate, up), self._before.rows[span.index]
            inputs.add(h, rows, span.weight.square())
            if compared:
                missing, residual, weight = compared
                share = span.weight[:, None] * product(h, weight)
                residual.add(h, missing.aim(turn.expert, span, share), rows, span.weight)
        for x in turn.others():
            inputs.add_prior(turn.inner(x, gate, up))
        inputs.check(turn.down.name)
        return inputs, compared[1] if compared else None


def block_stages(
    live: LiveBlock, model: StreamedModel, states: States, goals: Goals | None
) -> Iterator[Stage]:
    """The stages of a block, its routed experts aside.

    Args:
        live: the block.
        model: the source.
        states: [R, L, D] before the block, the rows to calibrate on.
        goals: the original's states, where the stream is compared with them.
    """
    for specs in live.spec.stages:
        if goals and specs[0].writes_stream:
            yield ComparedStage(model, specs, live, states, goals.behind(specs[0], model.device))
        else:
            yield DenseStage(model, specs, live, states)


def expert_stages(
    model: StreamedModel, turn: Turn, calibrated: int, rows: Tensor, missing: Missing | None
) -> tuple[GateUpStage, DownStage]:
    """The two stages of an expert, which no other expert of its block has a part in.

    Args:
        model: the source.
        turn: the expert's, with all tokens.
        calibrated: how many of all tokens are calibrated on, the first ones.
        rows: [T] each token's calibration row.
        missing: what the stream misses behind the experts, if it is compared with the original's.
    """
    before = GateUpStage(model, turn.part(slice(calibrated)), rows)
    return before, DownStage(before, turn, missing)
