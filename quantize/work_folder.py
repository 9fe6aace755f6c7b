"""The work folder of a conversion: what it was started with, and that only one process works in it."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.watched import ChangedError

Resume = Literal["auto", "never", "must"]

JOB_NAME = "job.json"
_FILE = JsonFile("a job file", version=1, remedy="start over with --resume never")


@contextmanager
def open_job(folder: Path, facts: Mapping[str, Any], resume: Resume) -> Iterator[bool]:
    """Lock a work folder while the `with` block runs; yields whether work is resumed.

    Args:
        folder: the work folder, made if needed.
        facts: everything that decides the results, JSON-ready.
        resume: "auto" resumes earlier work of the same facts, "must" requires it, "never" discards it.

    Work on a source that changes under way cannot be resumed.

    Raises:
        ValueError: earlier work was started with other facts (each difference is named), there is none though
            there must be, the folder holds something else, or another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOB_NAME
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another process is working in this folder") from None
        if not path.exists() and any(p.name != ".lock" for p in folder.iterdir()):
            raise ValueError(
                f"{folder}: not empty, and not a work folder of dbrx-quant; choose another --work-dir"
            )
        if resume == "never":
            for child in folder.iterdir():
                if child.name != ".lock":
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        if resume == "must" and not path.exists():
            raise ValueError(f"{folder}: no earlier work to resume")
        resumed = path.exists()
        if resumed:
            _check_same(path, facts)
        else:
            _FILE.write(path, {"facts": facts})
        try:
            yield resumed
        except ChangedError as error:  # what was made of two states of a file is nobody's work
            _FILE.write(path, {"facts": {**facts, "model": str(error)}})
            raise


def _check_same(path: Path, facts: Mapping[str, Any]) -> None:
    earlier = _FILE.read(path).object("facts").values
    different = differences(earlier, json.loads(json.dumps(facts)))
    if different:
        raise ValueError(
            f"{path.parent}: holds work of another conversion: {'; '.join(different)}. "
            "Give the earlier arguments, another --work-dir, or --resume never to discard that work"
        )


def differences(earlier: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, a phrase each."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        found = []
        for key in sorted(earlier.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            found += differences(earlier.get(key), now.get(key), inner)
        return found
    return [] if earlier == now else [f"{where} was {earlier!r}, now {now!r}"]
