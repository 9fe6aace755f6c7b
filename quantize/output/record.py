"""`conversion.json` of a quantized folder: how it was made, with which versions, and each linear's error.

Nothing in it depends on when or where the conversion ran: a resumed one writes the same bytes, and a
published one tells no path of the machine.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.shards.filling import Facts

RECORD_NAME = "conversion.json"
_FILE = JsonFile("a record of a conversion", version=1, remedy="delete it")

_PACKAGES = ("dbrx-quant", "torch", "numpy", "safetensors", "transformers", "tokenizers")


@dataclass(frozen=True)
class Record:
    """How a checkpoint was made.

    Attributes:
        command: the command line that makes it again.
        settings: the options that decided the result.
        versions: package → version.
        relative_errors: linear → tr(E^T H E) / tr(W^T H W) on the inputs it was quantized for.
    """

    command: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    relative_errors: Mapping[str, float]


def write_record(out: Path, options: ConvertOptions, target: float, linears: Mapping[str, Facts]) -> None:
    """Write `conversion.json`.

    Args:
        out: the finished checkpoint's folder.
        options: what it was made with.
        target: bits per weight that it was made for.
        linears: loss and energy of each quantized linear.
    """
    errors = {
        name: float(f"{facts.loss / facts.energy:.4g}")
        for name, facts in linears.items()
        if facts.energy > 0  # else no token has reached it
    }
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    _FILE.write(
        out / RECORD_NAME,
        {
            "command": options.command(target),
            "settings": options.settings(target),
            "versions": versions,
            "relative_errors": errors,
        },
    )


def read_record(folder: Path) -> Record | None:
    """A folder's `conversion.json`; None where there is none, as in folders of other converters.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    try:
        fields = _FILE.read(Path(folder) / RECORD_NAME)
    except FileNotFoundError:
        return None
    versions, errors = fields.object("versions"), fields.object("relative_errors")
    return Record(
        fields.text("command"),
        fields.object("settings").values,
        {name: versions.text(name) for name in versions.values},
        {name: errors.number(name, 0) for name in errors.values},
    )
