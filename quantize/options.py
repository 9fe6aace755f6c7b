"""The options of a conversion, each declared once with all that the rest of the program needs to know.

From a declaration come the argument of the command and its help, the check of the value, whether earlier
work can be resumed (`work_facts`), and the option's place in the result's record (`command`, `settings`).
A new option is a new field of `ConvertOptions`, and the code that it is for.

Imported for `--help`, so it imports nothing heavy.
"""

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.quantize.declared import DECLARED, Declared, check, fact, flag, option, shown

if TYPE_CHECKING:
    from dbrx_quant.quantize.solve.ldlq import Effort
    from dbrx_quant.quantize.solve.repair import Repair
    from dbrx_quant.quantize.work_folder import Resume


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how; the help of each declaration says what it is.

    The order is that of the recorded command line. None stands for what the help calls the default.

    Attributes:
        model: the original's folder.
        out: the result's folder; with several targets, their parent.
        targets: bits per weight of the decoder's linears, overhead included.

    Raises:
        ValueError: a value out of bounds, or rows of held-out text without a text.
    """

    model: Path
    out: Path
    targets: tuple[float, ...] = ()
    head_bits: int = option(
        "choice",
        "width of the head (default: %(default)s)",
        6,
        changes="target",
        measuring=False,
        choices=(2, 3, 4, 5, 6, 8),
    )
    calibration: str = option(
        "text",
        "'default' (a mix from the Hub), 'offline' (text of the Python installation), a .txt, .jsonl, "
        ".parquet or tokens .safetensors file, or a dataset org/name[:config[:split[:column]]]",
        "default",
        changes="everything",
        group="calibration",
        metavar="NAME|FILE",
        names_file=True,
    )
    rows: int | None = option(
        "whole", "calibration rows (default: 128)", changes="everything", group="calibration", least=1
    )
    length: int | None = option(
        "whole",
        "tokens per row (default: 2048, half of it from 8 billion weights on, a quarter from 32 billion on; "
        "or the model's limit)",
        changes="everything",
        group="calibration",
        least=1,
    )
    seed: int = option(
        "whole",
        "seed of all random draws (default: %(default)s)",
        0,
        changes="everything",
        group="calibration",
    )
    effort: "Effort" = option(
        "choice",
        "how long to look for the best codes and scales; fast is half the work (default: %(default)s)",
        "default",
        changes="everything",
        group="work",
        choices=("fast", "default", "best"),
    )
    refit: bool = option(
        "switch",
        "fit the scales of groups again once their codes are fixed",
        False,
        changes="everything",
        measuring=False,
    )
    measurement: Path | None = option(
        "file", "a measurement of this model to reuse", changes="everything", measuring=False, metavar="FILE"
    )
    held_out: str | None = option(
        "text",
        "text of the kind the model is for, to predict and measure the KL on; like --calibration, but "
        "never calibrated on (default: one calibration row in seven)",
        changes="everything",
        group="calibration",
        metavar="NAME|FILE",
        names_file=True,
    )
    held_out_rows: int | None = option(
        "whole",
        "rows of --held-out (default: 16; of ready tokens all)",
        changes="everything",
        group="calibration",
        least=1,
        metavar="N",
    )
    work_dir: Path | None = option("folder", "for resuming (default: OUT.work)", group="work", metavar="DIR")
    resume: "Resume" = option(
        "choice",
        "auto resumes earlier work, must requires it, never discards it (default: %(default)s)",
        "auto",
        group="work",
        choices=("auto", "never", "must"),
    )
    max_memory: int | None = option(
        "size", "refuse to start if more is needed, e.g. 24GB", group="work", metavar="SIZE"
    )
    device: str = option(
        "device",
        "where products are computed, such as cuda; codes are searched on the CPU (default: %(default)s)",
        "cpu",
        changes="everything",
        group="work",
        implied=True,
    )
    max_shard_bytes: int = option(
        "size",
        "largest file (default: 8GB); a finished result keeps its files",
        8_000_000_000,
        measuring=False,
        least=1,
        metavar="SIZE",
        flag="--max-shard-size",
    )
    quiet: bool = option("switch", "no progress on stderr", False, group="work")

    def __post_init__(self) -> None:
        for name, declared in declarations():
            check(name, getattr(self, name), declared)
        if self.held_out_rows is not None and self.held_out is None:
            raise ValueError(f"{self.held_out_rows} held-out rows asked for, but no text; give --held-out")

    @property
    def repair(self) -> "Repair":
        """How the residual stream is repaired: it costs as much as all the rest of quantizing a target."""
        from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, NO_REPAIR

        return NO_REPAIR if self.effort == "fast" else DEFAULT_REPAIR

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.work_dir or self.out.with_name(f"{self.out.name}.work")

    def output(self, target: float) -> Path:
        """The folder of one target's result."""
        return self.out if len(self.targets) == 1 else self.out / target_name(target)

    def settings(self, target: float) -> dict[str, Any]:
        """What decides the result of a target, as others may see it: JSON-ready, paths reduced to names."""
        decisive = {
            name: shown(getattr(self, name), declared)
            for name, declared in declarations()
            if declared.changes != "nothing" and not self._goes_without_saying(name, declared)
        }
        return {"model": source_name(self.model), "bpw": target, **decisive}

    def command(self, target: float) -> str:
        """The command line that makes a target's result again, paths reduced to names."""
        words = ["dbrx-quant", "convert", source_name(self.model), "OUT", "--bpw", str(target)]
        for name, declared in declarations():
            value = getattr(self, name)
            if declared.changes == "nothing" or value is None or value is False:
                continue
            if self._goes_without_saying(name, declared):
                continue
            words.append(flag(name, declared))
            if declared.kind != "switch":
                words.append(str(shown(value, declared)))
        return shlex.join(words)

    def _goes_without_saying(self, name: str, declared: Declared) -> bool:
        return declared.implied and getattr(self, name) == defaults()[name]

    def work_facts(self) -> dict[str, Any]:
        """What everything in the work folder depends on, files by their contents; targets have folders."""
        return {
            name: fact(getattr(self, name), declared)
            for name, declared in declarations()
            if declared.changes == "everything"
        }


def declarations() -> Iterator[tuple[str, Declared]]:
    """Every declared option, in order."""
    for one in _declared_fields():
        yield one.name, one.metadata[DECLARED]


def defaults() -> dict[str, Any]:
    """The default of every declared option."""
    return {one.name: one.default for one in _declared_fields() if one.default is not MISSING}


def target_name(target: float) -> str:
    """A target as folders and branches are named: `3.0bpw`, `2.25bpw`."""
    return f"{target}bpw"


def source_name(folder: Path) -> str:
    """A model folder's name; of one in the Hub's cache the id of its repository."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def _declared_fields() -> Iterator["Field[Any]"]:
    for one in fields(ConvertOptions):
        if DECLARED in one.metadata:
            yield one
