"""What a conversion is asked for."""

from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.quantize.job import Resume
from dbrx_quant.quantize.ldlq import Effort
from dbrx_quant.quantize.repair import DEFAULT_REPAIR, Repair


def target_name(target: float) -> str:
    """A target as folders and branches are named: `3.0bpw`, `2.25bpw`."""
    return f"{target}bpw"


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how.

    Attributes:
        model: the original's folder.
        out: the result's folder; with several targets, their parent.
        targets: bits per weight of the decoder's linears, overhead included.
        head_bits: width of the head.
        calibration: a named set, a file, or a dataset (see `calibration.data`).
        rows: calibration rows; None: as many as the set offers or usually has.
        length: tokens of a row.
        seed: of everything drawn.
        effort: "fast", "default" or "best": how long the solver looks for codes and scales; "fast" also
            leaves out the repair of the residual stream.
        held_out: text that KL is predicted and measured on, named as `calibration` is; None: one row in seven
            of the calibration, which is then not calibrated on.
        held_out_rows: its rows, as long as the calibration's; None: 16, of ready tokens all.
        refit: whether each linear's group maxima are fitted once more when its codes are fixed.
        measurement: an earlier measurement.json of the same model to use instead of measuring.
        work_dir: for everything that a resumed run needs; None: beside `out`, named `<out>.work`.
        resume: whether to go on with earlier work.
        max_memory: bytes that the conversion may take; None: no limit.
        device: where it computes; "cpu".
        max_shard_bytes: limit of an output file; a result that is finished already keeps its files.
        quiet: no progress.

    Raises:
        ValueError: rows of held-out text, but no text.
    """

    model: Path
    out: Path
    targets: tuple[float, ...] = ()
    head_bits: int = 6
    calibration: str = "default"
    rows: int | None = None
    length: int | None = None
    seed: int = 0
    effort: Effort = "default"
    held_out: str | None = None
    held_out_rows: int | None = None
    refit: bool = False
    measurement: Path | None = None
    work_dir: Path | None = None
    resume: Resume = "auto"
    max_memory: int | None = None
    device: str = "cpu"
    max_shard_bytes: int = 8_000_000_000
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.held_out_rows is not None and self.held_out is None:
            raise ValueError(f"{self.held_out_rows} held-out rows asked for, but no text; give --held-out")

    @property
    def repair(self) -> Repair | None:
        """How the residual stream is repaired: it costs as much as all the rest of quantizing a target."""
        return None if self.effort == "fast" else DEFAULT_REPAIR

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.work_dir or self.out.with_name(f"{self.out.name}.work")

    def output(self, target: float) -> Path:
        """The folder of one target's result."""
        return self.out if len(self.targets) == 1 else self.out / target_name(target)
