"""The strategy of a conversion: the option that each linear gets, and the file that records it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.quantize.measurement import Option
from dbrx_quant.runtime.files.json_file import JsonFile

STRATEGY_NAME = "strategy.json"
FILE = JsonFile("a strategy", version=1, remedy="convert again", unmarked=1)


@dataclass(frozen=True)
class Strategy:
    """What each linear gets.

    Attributes:
        target_bpw: what was asked for.
        bpw: what the decoder's linears take on disk, overhead included, per weight.
        kl: predicted KL divergence in nats per token, head included: from `allocate` the sum of all errors,
            each to second order, which `predict` refines.
        choices: linear → its option.
    """

    target_bpw: float
    bpw: float
    kl: float
    choices: Mapping[str, Option]

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "target_bpw": self.target_bpw,
            "bpw": self.bpw,
            "predicted_kl": self.kl,
            "linears": {
                name: {"bits": option.bits, "error": option.error, "groups": option.groups}
                for name, option in self.choices.items()
            },
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a strategy.

    Attributes:
        held_out: the text that `measured` is of; None: calibration rows.
        measured: scores of the finished model on it (`evaluation.scores`); None: it was not measured.
        notes: what people should know about the result.
    """

    held_out: str | None
    measured: Mapping[str, Any] | None
    notes: Sequence[str]


def write_strategy(path: Path, strategy: Strategy, outcome: Outcome | None = None) -> None:
    """Write a `strategy.json`, atomically; with its outcome once there is one."""
    found = {} if outcome is None else vars(outcome)
    FILE.write(path, {**strategy.to_json(), **found})


def read_strategy(path: Path) -> tuple[Strategy, Outcome | None]:
    """The strategy in a file and its outcome, every field checked.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or of another version.
    """
    fields = FILE.read(path)
    choices = {
        name: Option(linear.integer("bits", 1), linear.number("error", 0), linear.text("groups"))
        for name, linear in fields.objects("linears")
    }
    strategy = Strategy(
        fields.number("target_bpw", 0), fields.number("bpw", 0), fields.number("predicted_kl"), choices
    )
    if "measured" not in fields:
        return strategy, None
    measured = None
    if fields.values["measured"] is not None:
        scores = fields.object("measured")
        for name in ("kl", "top1"):
            scores.number(name)
        for name in ("ppl", "reference_ppl", "kl_stderr"):
            scores.number_or_none(name)
        measured = scores.values
    held_out = fields.text_or_none("held_out") if "held_out" in fields else None
    return strategy, Outcome(held_out, measured, [str(note) for note in fields.items("notes")])


def find_strategy(folder: Path) -> tuple[Strategy, Outcome | None] | None:
    """The strategy in a quantized folder; None where there is none, as in folders of other converters.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        return read_strategy(folder / STRATEGY_NAME)
    except FileNotFoundError:
        return None
