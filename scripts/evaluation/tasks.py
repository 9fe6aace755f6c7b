"""The tasks of an evaluation: run by the quantized model, and by its original where there is room for it."""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.evaluation.original import first_device
from dbrx_quant.scripts.terminal.output import bytes_text, print_table, say

Entry = dict[str, Any]
_ORIGINALS = ("value", "stderr")


def settings_of(arguments: argparse.Namespace) -> Any:
    """The settings that a command line gives, as `TaskSettings`."""
    from dbrx_quant.runtime.evaluation.tasks import TaskSettings

    return TaskSettings(
        names=tuple(arguments.tasks),
        folder=arguments.tasks_path,
        limit=arguments.limit,
        fewshot=arguments.fewshot,
        seed=arguments.seed,
        batch=arguments.batch,
    )


def original_scores(arguments: argparse.Namespace, tasks: Any, tokenizer: Any) -> list[Entry]:
    """The original's scores; none without it, or if it does not fit into memory, which is said."""
    if not arguments.reference:
        return []
    from dbrx_quant.runtime.evaluation.tasks import run_tasks
    from dbrx_quant.runtime.families.source import open_source
    from dbrx_quant.runtime.folder.find import find_folder
    from dbrx_quant.runtime.kernels.device import available_memory, free_bytes
    from dbrx_quant.runtime.model.load_dense import load_dense

    folder, device = find_folder(arguments.reference, None), first_device(arguments)
    wanted, host = _whole_bytes(open_source(folder).architecture), available_memory()
    on_device = free_bytes(device)
    free = min(bytes for bytes in (host, on_device, 1 << 62) if bytes is not None)
    if wanted > free:
        needs = f"it takes {bytes_text(wanted)} of memory in float32, {bytes_text(free)} are free"
        say(f"tasks without the original: {needs}")
        return []
    scores = run_tasks(tasks, load_dense(folder).to(device), tokenizer, arguments.quiet)
    gc.collect()  # or it would be in memory beside the quantized model
    return scores


def beside(scores: Sequence[Entry], originals: Sequence[Entry], bpw: float) -> list[Entry]:
    """Scores as `evaluation.json` has them: with the original's, if there are any, and the bits."""
    known = {_key(entry): entry for entry in originals}
    return [
        entry
        | {f"{name}_original": known[_key(entry)][name] if known else None for name in _ORIGINALS}
        | {"bpw": bpw}
        for entry in scores
    ]


def print_tasks(title: str, entries: Sequence[Entry], folder: Path) -> None:
    """A table of scores."""
    rows = [
        [
            entry["task"],
            entry["metric"] + ("" if entry["filter"] == "none" else f" ({entry['filter']})"),
            str(entry["fewshot"]),
            str(entry["samples"]),
            _value(entry["value"], entry["stderr"]),
            _value(entry["value_original"], entry["stderr_original"]),
        ]
        for entry in entries
    ]
    versions = ", ".join(f"{name} {number}" for name, number in entries[0]["versions"].items())
    columns = ["task", "metric", "shots", "documents", folder.name, "original"]
    print_table(title, columns, rows, left=2, note=f"{versions}; seed {entries[0]['seed']}")


def _value(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry["task"], entry["metric"], entry["filter"]


def _whole_bytes(architecture: Any) -> int:
    """A model in float32."""
    import math

    shapes = [spec.shape for spec in (*architecture.linears(), *architecture.all_floats())]
    return sum(4 * math.prod(shape) for shape in shapes)
