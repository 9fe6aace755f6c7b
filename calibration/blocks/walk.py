"""The one walk through a block: rows at a time through attention, then its experts, one turn after another.

Measuring, quantizing and predicting all go through blocks this way and differ in what they do at a turn:

    routing = route(live, states, output, x)       # the block without its experts; where each token goes
    for turn in turns(routing, experts):           # one expert at a time, in order
        for span in turn.spans():                  # its tokens, some at a time
            ...                                    # inputs, `turn.inner(...)`, gradients, noise
        turn.add_to(stream, weights)               # its share, before the next one's turn

Axes: R rows, L tokens of a row, T tokens, D hidden, N and K output and input channels, A experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import LiveBlock, Routing, StreamedModel
from dbrx_quant.calibration.blocks.routing import ExpertTokens, tokens_of
from dbrx_quant.calibration.blocks.states import States, new_states, scratch
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.kernels.device import download, upload
from dbrx_quant.runtime.kernels.float_matmul import product, rounded_dtype

ROWS_TOKENS = 2048  # tokens that go through a block's attention at a time
EXPERT_TOKENS = 2048  # tokens that go through an expert, or the head, at a time

Weights = tuple[Tensor, Tensor, Tensor]  # gate, up and down of an expert, [N, K]
Through = Callable[[Tensor, LinearSpec], Tensor]  # what happens to a linear's output [T, N] on its way
AddExperts = Callable[[Tensor, StreamedModel, ExpertsSpec, Routing], None]  # to the stream [T, D]


def unchanged(output: Tensor, spec: LinearSpec) -> Tensor:
    """Nothing happens to a linear's output."""
    return output


def spans(count: int, step: int, begin: int = 0) -> Iterator[slice]:
    """Slices of at most `step` that cover what lies from `begin` to `count`."""
    for start in range(begin, count, step):
        yield slice(start, min(start + step, count))


def token_spans(count: int) -> Iterator[slice]:
    """Slices of at most EXPERT_TOKENS tokens."""
    yield from spans(count, EXPERT_TOKENS)


def batches(states: Tensor | States) -> Iterator[slice]:
    """Slices of rows with about ROWS_TOKENS tokens each."""
    yield from spans(states.shape[0], max(1, ROWS_TOKENS // states.shape[1]))


def check_states(states: Tensor, what: str) -> None:
    """Raise ValueError unless all states are finite."""
    for part in batches(states):
        if not bool(torch.isfinite(states[part]).all()):
            row = int((~torch.isfinite(states[part])).nonzero()[0, 0]) + part.start
            raise ValueError(
                f"{what}: NaN or infinity in row {row}; the source model overflows in float32 on "
                "this text, or its weights are damaged"
            )


def token_rows(states: Tensor | States) -> Tensor:
    """The calibration row of each token, [R L]."""
    return torch.arange(states.shape[0]).repeat_interleave(states.shape[1])


def _without_experts(
    live: LiveBlock, states: Tensor | States, output: Tensor | None, middle: Tensor | None, part: slice
) -> None:
    """Run some rows through a block but its routed experts; `middle`, if given, gets them after attention."""
    if middle is None:
        after = live(states[part])[0]
    else:
        after, middle[part] = live.with_middle(states[part])
    if output is not None:
        output[part] = after


def route(
    live: LiveBlock, states: Tensor | States, output: Tensor | None, x: Tensor, middle: Tensor | None = None
) -> Routing:
    """Run all rows through a block but its routed experts; what comes of it is on the host.

    Args:
        live: the block.
        states: [R, L, D] before it.
        output: filled with those after it, but for what routed experts add, if given.
        x: [R L, D], filled with the experts' inputs.
        middle: filled with the states after attention, if given.
    """
    index, weight = [], []
    length = states.shape[1]
    for part in batches(states):
        _without_experts(live, states, output, middle, part)
        routing = live.routing
        assert routing is not None
        x[part.start * length : part.stop * length] = routing.x
        index.append(routing.index)
        weight.append(routing.weight)
    return Routing(x, torch.cat(index).cpu(), torch.cat(weight).cpu(), live.device)


@dataclass(frozen=True)
class Span:
    """Some of an expert's tokens.

    Attributes:
        index: [T] positions among all tokens, on the host.
        x: [T, D] inputs, on the expert's device.
        weight: [T] routing weights, likewise.
        slot: [T] which of the token's A choices the expert is, on the host.
        part: where they are among the expert's tokens.
    """

    index: Tensor
    x: Tensor
    weight: Tensor
    slot: Tensor
    part: slice


@dataclass(frozen=True)
class Turn:
    """One expert's turn.

    Attributes:
        expert: its number.
        gate: its first linear; likewise the next two.
        up: beside the gate, with the same inputs.
        down: behind both.
        routing: of all tokens.
        activate: the activation function between them.
    """

    expert: int
    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    routing: Routing
    activate: Callable[[Tensor], Tensor]

    @property
    def linears(self) -> tuple[LinearSpec, LinearSpec, LinearSpec]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    def part(self, tokens: slice) -> "Turn":
        """The same expert's turn with some of the tokens."""
        return Turn(self.expert, *self.linears, self.routing.part(tokens), self.activate)

    @cached_property
    def tokens(self) -> ExpertTokens:
        """The tokens that are routed to it, and some that are not."""
        return tokens_of(self.routing, self.expert)

    @property
    def count(self) -> int:
        """How many tokens are routed to it."""
        return len(self.tokens.index)

    def dense(self, model: StreamedModel) -> Weights:
        """Its weights as the source has them, float32."""
        return model.dense(self.gate), model.dense(self.up), model.dense(self.down)

    def narrowed(self, model: StreamedModel) -> Weights:
        """Its weights as the source has them, for products that need not be exact."""
        gate, up, down = (model.dense(spec, rounded_dtype(model.device)) for spec in self.linears)
        return gate, up, down

    def spans(self, begin: int = 0, end: int | None = None) -> Iterator[Span]:
        """Its tokens from number `begin` to `end`, at most EXPERT_TOKENS at a time."""
        for part in spans(self.count if end is None else end, EXPERT_TOKENS, begin):
            yield self._span(part)

    def whole(self) -> Span:
        """All its tokens at once."""
        return self._span(slice(None))

    def others(self) -> Iterator[Tensor]:
        """Inputs [T, D] of tokens that are routed elsewhere, some at a time."""
        for part in token_spans(len(self.tokens.others)):
            yield self._inputs(self.tokens.others[part])

    def inner(self, x: Tensor, gate: Tensor, up: Tensor, through: Through = unchanged) -> Tensor:
        """act(gate x) * up x, the input of the down projection, for tokens [T, D] and weights [N, K]."""
        return self.activate(through(product(x, gate), self.gate)) * through(product(x, up), self.up)

    def shares(
        self, weights: Weights, through: Through = unchanged, at_once: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the expert adds to the stream: positions [T] on the host, shares [T, D] on its device.

        Args:
            weights: of the expert.
            through: what happens to the linears' outputs.
            at_once: all tokens in one piece.
        """
        gate, up, down = weights
        for span in (self.whole(),) if at_once else self.spans():
            output = through(product(self.inner(span.x, gate, up, through), down), self.down)
            yield span.index, span.weight[:, None] * output

    def add_to(
        self, stream: Tensor, weights: Weights, through: Through = unchanged, at_once: bool = False
    ) -> None:
        """Add the shares to states [T, D] on the host."""
        for index, share in self.shares(weights, through, at_once):
            stream[index] += download(share)

    def _span(self, part: slice) -> Span:
        index = self.tokens.index[part]
        weight = self.tokens.weight[part].to(self.routing.device)
        return Span(index, self._inputs(index), weight, self.tokens.slot[part], part)

    def _inputs(self, index: Tensor) -> Tensor:
        return upload(self.routing.x[index], self.routing.device)


def turns(routing: Routing, experts: ExpertsSpec) -> Iterator[Turn]:
    """The experts of a block in order; `routing` is of all tokens, with the experts' inputs."""
    activate = activation(experts.activation)
    for expert, (gate, up, down) in enumerate(experts.linears):
        yield Turn(expert, gate, up, down, routing, activate)


def add_dense_experts(stream: Tensor, model: StreamedModel, experts: ExpertsSpec, routing: Routing) -> None:
    """Add what the unquantized experts of a block add to the stream, states [T, D]."""
    for turn in turns(routing, experts):
        if turn.count:
            turn.add_to(stream, turn.narrowed(model))


def embed_rows(model: StreamedModel, tokens: Tensor, path: Path) -> None:
    """Write the states [R, L, D] before the first block."""
    with new_states(path, (*tokens.shape, model.architecture.hidden)) as states:
        for part in batches(states):
            states[part] = model.embed(tokens[part])


def run_dense_block(
    model: StreamedModel,
    index: int,
    states: States,
    output: Tensor,
    folder: Path,
    middle: Tensor | None = None,
    shared: Tensor | None = None,
    add_experts: AddExperts = add_dense_experts,
) -> Routing | None:
    """Take states [R, L, D] through an unquantized block.

    Args:
        model: the source.
        index: of the block.
        states: before it.
        output: filled with those after it.
        folder: for the experts' inputs while it runs.
        middle: filled with those after its attention, if given.
        shared: filled with those before its routed experts, if given.
        add_experts: adds what the routed experts add.

    Returns:
        Where each token went, if the block has experts; their inputs stay on disk as long as this lives.
    """
    live = model.block(index)
    if live.spec.experts is None:
        for part in batches(states):
            _without_experts(live, states, output, middle, part)
        return None
    hidden = states.shape[-1]
    x = scratch(folder, (states.shape[0] * states.shape[1], hidden))
    routing = route(live, states, output, x, middle)
    if shared is not None:
        shared.copy_(output)
    add_experts(output.view(-1, hidden), model, live.spec.experts, routing)
    return routing


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name, transformers' own."""
    from transformers.activations import ACT2FN

    function: Any = ACT2FN[name]
    return lambda x: function(x)
