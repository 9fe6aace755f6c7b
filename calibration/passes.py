"""Taking hidden states through a block: rows at a time through its attention, tokens through its experts."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.calibration.experts import ExpertTokens, activation, expert_output, tokens_of
from dbrx_quant.calibration.states import new_states, open_states
from dbrx_quant.calibration.streamed import LiveBlock, Routing, StreamedModel
from dbrx_quant.runtime.families.facts import ExpertsSpec

ROWS_TOKENS = 2048  # tokens that go through a block's attention at a time
EXPERT_TOKENS = 2048  # tokens that go through an expert, or the head, at a time


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover `count`."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def token_spans(count: int) -> Iterator[slice]:
    """Slices of at most EXPERT_TOKENS tokens."""
    yield from spans(count, EXPERT_TOKENS)


def batches(states: Tensor) -> Iterator[slice]:
    """Slices of rows with about ROWS_TOKENS tokens each."""
    yield from spans(states.shape[0], max(1, ROWS_TOKENS // states.shape[1]))


def check_states(states: Tensor, what: str) -> None:
    """Raise ValueError unless all states are finite."""
    for part in batches(states):
        if not bool(torch.isfinite(states[part]).all()):
            row = int((~torch.isfinite(states[part])).nonzero()[0, 0]) + part.start
            raise ValueError(
                f"{what}: NaN or infinity in calibration row {row}; the source model overflows in float32 on "
                "this text, or its weights are damaged"
            )


def token_rows(states: Tensor) -> Tensor:
    """The calibration row of each token, [R L]."""
    return torch.arange(states.shape[0]).repeat_interleave(states.shape[1])


def route(live: LiveBlock, states: Tensor, output: Tensor, x: Tensor) -> Routing:
    """Run all rows through a block but its experts: fills `output` and the experts' inputs `x` [R L, D]."""
    index, weight = [], []
    length = states.shape[1]
    for part in batches(states):
        output[part], routing = live(states[part])
        assert routing is not None
        x[part.start * length : part.stop * length] = routing.x
        index.append(routing.index)
        weight.append(routing.weight)
    return Routing(x, torch.cat(index), torch.cat(weight))


def dense_shares(
    model: StreamedModel, experts: ExpertsSpec, routing: Routing
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the unquantized experts add to the stream, expert after expert: positions [T'], shares [T', D]."""
    act = activation(experts.activation)
    for expert, linears in enumerate(experts.linears):
        tokens = tokens_of(routing, expert)
        if len(tokens.index):
            gate, up, down = (model.dense(spec) for spec in linears)
            for part in token_spans(len(tokens.index)):
                index = tokens.index[part]
                share = expert_output(routing.x[index], (gate, up, down), act)
                yield index, tokens.weight[part, None] * share


class DenseShares:
    """What each expert would add to the stream unquantized: added at first, taken away when its turn comes.

    So the stream misses, at an expert's turn, what those before it have spoilt and not what those after it
    will add. The shares are kept on disk. A resumed run repeats the same sums and ends with the same bits.

    Args:
        path: of the file.
        model: for the dense weights.
        experts: of a block.
        routing: of all tokens, with the experts' inputs.
        flat: [T, D] states, changed in place.
    """

    def __init__(
        self, path: Path, model: StreamedModel, experts: ExpertsSpec, routing: Routing, flat: Tensor
    ) -> None:
        self._flat, self._path, self._next = flat, path, 0
        with new_states(self._path, (routing.index.numel(), flat.shape[1])) as shares:
            begin = 0
            for index, share in dense_shares(model, experts, routing):
                shares[begin : begin + len(index)] = share
                flat[index] += share
                begin += len(index)
        self._shares = open_states(self._path)

    def take_away(self, tokens: ExpertTokens) -> None:
        """Take the share of the next expert, whose tokens these are, out of the states."""
        for part in token_spans(len(tokens.index)):
            index = tokens.index[part]
            self._flat[index] -= self._shares[self._next : self._next + len(index)]
            self._next += len(index)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink()
