"""`conversion.json` of a quantized folder: how it was made, with which versions, and each linear's error.

Nothing in it depends on when or where the conversion ran: a resumed one writes the same bytes, and a
published one tells no path of the machine.
"""

import json
import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dbrx_quant.quantize.ldlq import Effort
from dbrx_quant.runtime.errors import CheckpointError
from dbrx_quant.runtime.files import write_json

RECORD_NAME = "conversion.json"
RECORD_VERSION = 1

_PACKAGES = ("dbrx-quant", "torch", "numpy", "safetensors", "transformers", "tokenizers")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint was made with; see `ConvertOptions`."""

    model: Path
    bpw: float
    head_bits: int
    calibration: str
    rows: int | None
    length: int | None
    seed: int
    effort: Effort
    refit: bool
    measurement: Path | None
    held_out: str | None = None
    held_out_rows: int | None = None

    @property
    def command(self) -> str:
        """The command line that makes this checkpoint again, paths reduced to names."""
        words = ["dbrx-quant", "convert", source_name(self.model), "OUT", "--bpw", str(self.bpw)]
        words += ["--head-bits", str(self.head_bits), "--calibration", plain_name(self.calibration)]
        for option, value in (("--rows", self.rows), ("--length", self.length)):
            words += [option, str(value)] if value is not None else []
        words += ["--seed", str(self.seed), "--effort", self.effort]
        words += ["--refit"] if self.refit else []
        words += ["--measurement", self.measurement.name] if self.measurement else []
        words += ["--held-out", plain_name(self.held_out)] if self.held_out else []
        words += ["--held-out-rows", str(self.held_out_rows)] if self.held_out_rows else []
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, paths reduced to names."""
        return {
            "model": source_name(self.model),
            "bpw": self.bpw,
            "head_bits": self.head_bits,
            "calibration": plain_name(self.calibration),
            "rows": self.rows,
            "length": self.length,
            "seed": self.seed,
            "effort": self.effort,
            "refit": self.refit,
            "measurement": self.measurement.name if self.measurement else None,
            "held_out": plain_name(self.held_out) if self.held_out else None,
            "held_out_rows": self.held_out_rows,
        }


def source_name(folder: Path) -> str:
    """A model folder's name; of one in the Hub's cache the id of its repository."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def write_record(out: Path, settings: Settings, linears: Path) -> None:
    """Write `conversion.json`.

    Args:
        out: the finished checkpoint's folder.
        settings: what it was made with.
        linears: the folder of the quantized linears, whose metadata has loss and energy.
    """
    errors = {}
    for file in sorted(linears.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        energy = float(metadata.get("energy", 0))  # zero: no token has reached it
        if energy > 0:
            errors[file.name.removesuffix(".safetensors")] = float(f"{float(metadata['loss']) / energy:.4g}")
    write_json(
        out / RECORD_NAME,
        {
            "format_version": RECORD_VERSION,
            "command": settings.command,
            "settings": settings.to_json(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "relative_errors": errors,
        },
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """A folder's `conversion.json`; None where there is none, as in folders of other converters.

    Its keys: `command`; `settings`; `versions`, package → version; `relative_errors`, linear →
    tr(E^T H E) / tr(W^T H W) on the inputs it was quantized for.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    path = Path(folder) / RECORD_NAME
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != RECORD_VERSION:
            found = record["format_version"]
            raise CheckpointError(f"{path}: format version {found!r}, this program reads {RECORD_VERSION}")
        record["command"].split()
        record["settings"].keys()
        record["versions"].items()
        if not all(type(value) in (int, float) for value in record["relative_errors"].values()):
            raise TypeError("a relative error is no number")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a record of a conversion ({error!r}); delete it") from None
    return record


def plain_name(calibration: str) -> str:
    """A calibration source as others may see it: of a file, the name alone."""
    path = Path(calibration)
    return path.name if path.is_file() else calibration
