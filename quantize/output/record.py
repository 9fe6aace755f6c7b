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

from safetensors import safe_open

from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.files.json_file import JsonFile

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


def write_record(out: Path, options: ConvertOptions, target: float, linears: Path) -> None:
    """Write `conversion.json`.

    Args:
        out: the finished checkpoint's folder.
        options: what it was made with.
        target: bits per weight that it was made for.
        linears: the folder of the quantized linears, whose metadata has loss and energy.
    """
    errors = {}
    for file in sorted(linears.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        energy = float(metadata.get("energy", 0))  # zero: no token has reached it
        if energy > 0:
            errors[file.name.removesuffix(".safetensors")] = float(f"{float(metadata['loss']) / energy:.4g}")
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
