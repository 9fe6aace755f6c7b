"""A run of a bench as a file of its history: the figures, and the machine and versions that they are of.

`docs/bench/README.md` says what is in such a file.
"""

import argparse
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.atomic import write_json
from dbrx_quant.scripts.cli.doctor import examine
from dbrx_quant.scripts.terminal.output import model_title

RECORD_VERSION = 1
_NOISE = re.compile(r"\(.*?\)|\b(cpu|processor|\d+-core|\w+ virtual)\b|@.*", re.IGNORECASE)
_PLAIN = (str, int, float, bool, type(None))


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--record`."""
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="add the figures to a history, such as docs/bench"
    )


def record(bench: str, arguments: argparse.Namespace, figures: Mapping[str, Any]) -> Path | None:
    """Write a run into the folder that `--record` names; its file, None where none is named.

    Args:
        bench: a short name, part of the file's.
        arguments: the command line; paths become names.
        figures: what was measured, JSON-ready.

    Raises:
        OSError: the folder cannot be written.
    """
    folder: Path | None = arguments.record
    if folder is None:
        return None
    now, cpu = datetime.now(UTC), cpu_model()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{now:%Y-%m-%d}-{bench}-{slug(cpu)}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():  # an earlier run of the day
        number += 1
        path = folder / f"{stem}-{number}.json"
    found = examine()
    write_json(
        path,
        {
            "format_version": RECORD_VERSION,
            "bench": bench,
            "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "commit": commit(Path(__file__).resolve()),
            "machine": {
                "cpu": cpu,
                "cores": found["threads"]["cpus"],
                "memory_bytes": found["memory"]["total"],
                "isa": found["native"]["isa"],
                "system": found["system"],
                "gpus": found["cuda"]["gpus"],
            },
            "versions": {"python": found["python"], **found["packages"]},
            "settings": settings(arguments),
            "figures": without_paths(figures),
        },
    )
    return path


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with x86's family and model: virtual machines often hide the rest of it."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        text = ""
    keys = ("model name", "cpu family", "model")
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in keys]
    name, family, model = (match and match[1].strip() for match in found)
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} (family {family}, model {model})" if family and model else name


def slug(name: str) -> str:
    """A processor's name for use in a file name: `AMD EPYC 9B45 96-Core Processor` is `amd-epyc-9b45`."""
    return re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", name).lower()).strip("-") or "unknown"


def commit(file: Path) -> str | None:
    """The commit of the checkout that holds `file`, with `+` if the tree differs; None without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # not a copy inside somebody else's repository
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plain values of a command line, but for those that say where output goes."""
    kept = {key: value for key, value in vars(arguments).items() if key not in ("record", "json", "plot")}
    plain = {key: without_paths(value) for key, value in kept.items() if not isinstance(value, Mapping)}
    return {key: value for key, value in plain.items() if isinstance(value, (*_PLAIN, list))}


def without_paths(value: Any) -> Any:
    """The value with names in place of paths, and of texts that are paths here."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value and Path(value).exists()):
        return model_title(str(value)) if Path(value).is_dir() else Path(value).name
    return value
