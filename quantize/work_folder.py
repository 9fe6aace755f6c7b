"""The work folder of a conversion: what it was started with, sound files, and one process at a time."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from dbrx_quant.quantize.rows import ROW_FILES
from dbrx_quant.runtime.files.atomic import remove_leftovers
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.lock import LOCK_NAME, locked
from dbrx_quant.runtime.files.sealed import remove, remove_damaged, seal_fault, was_sealed, was_sealed_as
from dbrx_quant.runtime.files.watched import ChangedError
from dbrx_quant.runtime.kernels.float_matmul import rounded_dtype

Resume = Literal["auto", "never", "must"]

JOB_NAME = "job.json"
EXCHANGE = ".exchange"  # for the files of one run that several workers give each other
_OWN = (LOCK_NAME, f".{JOB_NAME}.", ".worker-")  # what a start or a worker that was killed leaves
_FILE = JsonFile("a job file", version=1, remedy="start over with --resume never", sealed=True)


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of sums: facts of a work folder, and of each of its workers."""
    return {
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),  # the order of sums follows it
        "products (DBRXQ_PRODUCTS)": str(rounded_dtype(device)).removeprefix("torch."),
    }


@contextmanager
def open_job(folder: Path, facts: Mapping[str, Any], resume: Resume) -> Iterator[bool]:
    """Lock a work folder while the `with` block runs; yields whether work is resumed.

    What a killed process left half written is removed, and so is every file that is not as it was written;
    each of these is named on stderr, and made anew by whoever needs it.

    Args:
        folder: the work folder, made if needed.
        facts: everything that decides the results, JSON-ready.
        resume: "auto" resumes earlier work of the same facts, "must" requires it, "never" discards it.

    Work on a source that changes under way cannot be resumed.

    Raises:
        ValueError: earlier work was started with other facts (each difference is named), there is none though
            there must be, the folder holds something else or a link, or another process works in it.
        CheckpointError: the file that tells what it was started with is damaged.
    """
    path = folder / JOB_NAME
    with locked(folder):
        begun = os.path.lexists(path) or was_sealed(path)
        if not begun and any(not p.name.startswith(_OWN) for p in folder.iterdir()):
            raise ValueError(
                f"{folder}: not empty, and not a work folder of dbrx-quant; choose another --work-dir"
            )
        if resume == "never":
            _empty(folder)
        _refuse_links(folder)
        shutil.rmtree(folder / EXCHANGE, ignore_errors=True)
        resumed = (path.exists() or was_sealed(path)) and _is_same(path, facts)
        if resume == "must" and not resumed:
            raise ValueError(f"{folder}: no earlier work to resume")
        for parent, _, _ in os.walk(folder):
            remove_leftovers(parent)
        for damaged, fault in remove_damaged(folder):
            _tell(damaged, fault)
        if not resumed:
            for name in ROW_FILES:
                remove(folder / name)
            _FILE.write(path, {"facts": facts})
        try:
            yield resumed
        except ChangedError as error:  # what was made of two states of a file is nobody's work
            _FILE.write(path, {"facts": {**facts, "model": str(error)}})
            raise


def check_apart(folder: Path, others: Iterable[Path | None]) -> None:
    """Raise ValueError if something else lies in a work folder, which may be emptied."""
    for other in others:
        if other is not None and _real(other).is_relative_to(_real(folder)):
            raise ValueError(
                f"{other}: lies in the work folder {folder}, which may be emptied; keep it elsewhere"
            )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike `Path.resolve`, takes links that lead in a circle


def _is_same(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the work was started with the same facts; False, too, where nothing came of it."""
    if fault := seal_fault(path) if path.exists() else "missing":
        if not _has_work(path.parent):
            return False
        if not was_sealed_as(path, _FILE.text({"facts": facts}).encode()):
            raise CheckpointError(f"{path}: {fault}; start over with --resume never")
        _tell(path, fault)
        _FILE.write(path, {"facts": facts})
    earlier = _FILE.read(path).object("facts").values
    different = differences(earlier, json.loads(json.dumps(facts)))
    if different and _has_work(path.parent):
        raise ValueError(
            f"{path.parent}: holds work of another conversion: {'; '.join(different)}. "
            "Give the earlier arguments, another --work-dir, or --resume never to discard that work"
        )
    return not different


def _tell(path: Path, fault: str) -> None:
    print(f"notice: {path}: {fault}; it is made anew", file=sys.stderr)


def _has_work(folder: Path) -> bool:
    """Whether there is more in a work folder than a start that failed leaves."""
    trifles = {JOB_NAME, *ROW_FILES}
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return any(path.name not in trifles and all(not p.startswith(".") for p in path.parts) for path in files)


def _refuse_links(folder: Path) -> None:
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path}: a link or no regular file, which no work folder has; remove it")


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.name == LOCK_NAME:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def differences(earlier: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, a phrase each."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        found = []
        for key in sorted(earlier.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            found += differences(earlier.get(key), now.get(key), inner)
        return found
    return [] if earlier == now else [f"{where} was {earlier!r}, now {now!r}"]
