"""What an original predicts on rows of tokens, exactly, with one block of it in memory at a time.

States between blocks are float32 and products are not rounded: what comes out is what the whole model would
give, up to the order of its sums. States in 16 bits, as a conversion has them, would do little harm (a KL
divergence of 4.1324e-4 came out as 4.1336e-4, one top token in 4,096 was another), but float32 costs no more
than 4 bytes a value, once for all blocks, in a file without a name; the experts' inputs take as much.

Where they are kept, a walk that was ended goes on behind the last block that it has finished.

Axes: R rows, L tokens of a row, D hidden, A experts per token, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.states import scratch
from dbrx_quant.calibration.blocks.walk import batches, check_states, route, turns
from dbrx_quant.runtime.evaluation.scores import Outputs
from dbrx_quant.runtime.families.facts import ExpertsSpec
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.sealed import remove, seal, seal_fault
from dbrx_quant.runtime.kernels.device import upload
from dbrx_quant.runtime.kernels.float_matmul import fast_products

Notify = Callable[[int, int], None]  # steps done, steps in all

_KEPT = "states-{:03}.safetensors"


@dataclass(frozen=True)
class KeptStates:
    """Where the states between blocks are kept.

    Attributes:
        folder: of one file, which the next block's replaces.
        original: tells the original from others.
    """

    folder: Path
    original: str

    def discard(self, but: Path | None = None) -> None:
        """Remove what is kept, one file aside."""
        for path in self.folder.glob(_KEPT.format(0).replace("000", "???")):
            if path != but:
                remove(path)


@dataclass(frozen=True)
class Predictions:
    """The original's outputs on rows that it was taken through: a function for `evaluation.scores`.

    Attributes:
        model: the original.
        rows: [R, L] token ids.
        states: [R, L, D] float32 behind the last block, on the host.
        choices: a block with experts each: [R, L, A] int16 chosen ones, ascending.
        head: [V, D] float32, on the model's device.
    """

    model: StreamedModel
    rows: Tensor
    states: Tensor
    choices: tuple[Tensor, ...]
    head: Tensor

    def __call__(self, row: Tensor) -> Outputs:
        """Logits [L, V] and chosen experts of one of the rows.

        Raises:
            ValueError: it is none of them.
        """
        found = (self.rows == row).all(1).nonzero()
        if not len(found):
            raise ValueError("a row that the original was not taken through")
        at = int(found[0])
        hidden = self.model.final_norm(upload(self.states[at], self.model.device))
        return Outputs(hidden @ self.head.T, tuple(block[at].long() for block in self.choices))


@torch.no_grad()
def predict(
    model: StreamedModel,
    rows: Tensor,
    folder: Path,
    kept: KeptStates | None = None,
    progress: Notify | None = None,
) -> Predictions:
    """Take rows [R, L] through an original, block by block.

    Args:
        model: the original, opened with `exact`.
        rows: token ids, int64.
        folder: for states and the experts' inputs while it works, 8 R L D bytes.
        kept: where states are kept for a later call, 4 R L D bytes, twice that while they are written; what
            is there of the same original and rows is gone on with.
        progress: called after attention and after every expert with the steps done and their number.

    Raises:
        CheckpointError: a weight is missing or not finite, or a file of the original has changed.
        ValueError: the states of a block are not finite.
        OSError: the disk has no room.
    """
    blocks = model.architecture.blocks
    done, total = 0, sum(1 + (block.experts.count if block.experts else 0) for block in blocks)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with fast_products():
        first, rows, states, choices = _read(kept, rows) or _begin(model, rows, folder)
        for block in blocks[:first]:
            for _ in range(1 + (block.experts.count if block.experts else 0)):
                step()
        for block in blocks[first:]:
            chosen = _through(model, block.index, states, folder, step)
            if chosen is not None:
                choices.append(chosen)
            check_states(states, f"original: output of block {block.index}")
            if kept is not None:
                _keep(kept, block.index + 1, rows, states, choices)
        return Predictions(model, rows, states, tuple(choices), model.dense(model.architecture.head))


_Walk = tuple[int, Tensor, Tensor, list[Tensor]]  # blocks done, rows, states, chosen experts


def _begin(model: StreamedModel, rows: Tensor, folder: Path) -> _Walk:
    states = scratch(folder, (*rows.shape, model.architecture.hidden))
    for part in batches(states):
        states[part] = model.embed(rows[part])
    return 0, rows, states, []


def _through(
    model: StreamedModel, index: int, states: Tensor, folder: Path, step: Callable[[], None]
) -> Tensor | None:
    """Replace states [R, L, D] by those behind a block.

    Returns:
        [R, L, A] int16, the chosen experts in ascending order; None: the block has none.
    """
    live, hidden = model.block(index), states.shape[-1]
    if live.spec.experts is None:
        for part in batches(states):
            states[part] = live(states[part])[0]
        step()
        return None
    x = scratch(folder, (states.shape[0] * states.shape[1], hidden))
    routing = route(live, states, states, x)
    step()
    _add_experts(states.view(-1, hidden), model, live.spec.experts, routing, step)
    return routing.index.sort(-1).values.to(torch.int16).view(*states.shape[:2], -1)


def _add_experts(
    stream: Tensor, model: StreamedModel, experts: ExpertsSpec, routing: Routing, step: Callable[[], None]
) -> None:
    """Add what the experts add to the stream, states [T, D], none of their products rounded."""
    for turn in turns(routing, experts):
        if turn.count:
            turn.add_to(stream, turn.dense(model))
        step()


def _keep(kept: KeptStates, blocks: int, rows: Tensor, states: Tensor, choices: list[Tensor]) -> None:
    """Write the states behind so many blocks, and only then remove those before."""
    path = kept.folder / _KEPT.format(blocks)
    tensors = {f"choices.{i}": chosen for i, chosen in enumerate(choices)}
    save_tensors(path, {"rows": rows, "states": states, **tensors}, {"original": kept.original})
    seal(path)
    kept.discard(but=path)


def _read(kept: KeptStates | None, rows: Tensor) -> _Walk | None:
    """The last states that are kept of an original and all of the rows; None: there are none.

    Files that are damaged, of another original or of other rows are no hindrance: they are made anew.
    """
    if kept is None:
        return None
    for path in sorted(kept.folder.glob(_KEPT.format(0).replace("000", "???")), reverse=True):
        number = path.stem.rpartition("-")[2]
        if not number.isdecimal() or seal_fault(path):
            continue
        with safe_open(path, "pt") as opened:
            if (opened.metadata() or {}).get("original") != kept.original:
                continue
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        there = stored["rows"]
        if there.shape[1] == rows.shape[1] and all(bool((there == row).all(1).any()) for row in rows):
            chosen = [stored[f"choices.{i}"] for i in range(len(stored) - 2)]
            return int(number), there, stored["states"], chosen
    return None
