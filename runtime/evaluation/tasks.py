"""Tasks of lm-eval, EleutherAI's harness, on a loaded model: their scores, and what they were made with.

lm-eval is optional (`pip install 'dbrx-quant[tasks]'`) and does what it does for any model of transformers.
What is decided here is that products are exact and activations not rounded, as in `evaluation.scores`.
"""

import difflib
import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.kernels.float_matmul import fast_products

_VERSIONS = ("lm_eval", "transformers", "torch")
_SHOWN = 200  # characters of what a library says


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, and how.

    Attributes:
        names: of tasks, groups or tags.
        folder: of task files (YAML) that lm-eval does not bring; None: there are none.
        limit: documents of each task, the first ones; None: all.
        fewshot: examples before each question; None: as the task says.
        seed: of all that is drawn, examples above all.
        batch: sequences at a time.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    seed: int = 1234
    batch: int = 1


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found and whose data is there."""

    settings: TaskSettings
    manager: Any  # lm-eval's


def open_tasks(settings: TaskSettings, quiet: bool = False) -> Tasks:
    """Find tasks and read their data, before a model is loaded for them.

    A folder of one's own is looked into first, and alone if it has them all: lm-eval's list takes seconds.

    Args:
        settings: which tasks.
        quiet: nothing on stderr.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task or folder, its file is wrong, or its data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-eval: pip install 'dbrx-quant[tasks]'")
    task_manager = import_module("lm_eval.tasks").TaskManager
    if settings.folder is not None and not settings.folder.is_dir():
        raise ValueError(f"{settings.folder}: no such folder; --tasks-path names one with task files (YAML)")
    own = None if settings.folder is None else str(settings.folder)
    manager = task_manager(include_path=own, include_defaults=False) if own else None
    if manager is None or not set(settings.names) <= set(manager.all_tasks):
        manager = task_manager(include_path=own)
    for name in settings.names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else "; is its file in --tasks-path?"
            known = f"lm-eval {version('lm_eval')}" + (f" or {own}" if own else "")
            raise ValueError(f"--tasks: no task {name!r} in {known}{hint}")
        try:
            with _hushed(quiet):
                manager.load([name])
        except Exception as error:  # whatever a task's file or the reader of its data raises
            raise ValueError(
                f"task {name}: cannot be loaded: {_one_line(error)}; data that cannot be fetched has to be "
                "on this machine, and a task file in --tasks-path to name it (dataset_path: json, data_files)"
            ) from error
    return Tasks(settings, manager)


@fast_products()
@use_activations("float")
def run_tasks(tasks: Tasks, model: Any, tokenizer: Any, quiet: bool = False) -> list[dict[str, Any]]:
    """The scores of a model, an entry for each task (or group) and metric.

    Args:
        tasks: from `open_tasks`.
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        quiet: nothing on stderr.

    Returns:
        Entries with `task`, its `version` as text, `metric`, `filter`, `value`, `stderr` (None: not known),
        `higher_is_better` (None: not known), `fewshot`, `samples`, `limit`, `seed` and `versions` of
        packages; those of `evaluation.record` but for the original's values and the bits.

    Raises:
        ValueError: lm-eval cannot run a task.
    """
    harness, huggingface = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    settings, seed = tasks.settings, tasks.settings.seed
    with _quoted(), _hushed(quiet):
        found = harness.simple_evaluate(
            model=huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch),
            tasks=list(settings.names),
            task_manager=tasks.manager,
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None  # it is the only process
    return list(_entries(found, settings))


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """What is printed inside goes to stderr, or nowhere."""
    sink = io.StringIO() if quiet else sys.stderr
    with redirect_stdout(sink), redirect_stderr(sink):
        yield


@contextmanager
def _quoted() -> Iterator[None]:
    """What goes wrong inside of lm-eval, as an error of the tasks."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"lm-eval cannot run the tasks: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _entries(found: Mapping[str, Any], settings: TaskSettings) -> Iterator[dict[str, Any]]:
    versions = {name: version(name) for name in _VERSIONS}
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task,
                "version": str(found["versions"].get(task, "")),
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                "fewshot": int(found["n-shot"].get(task) or 0),
                "samples": _samples(found, task),
                "limit": settings.limit,
                "seed": settings.seed,
                "versions": versions,
            }


def _samples(found: Mapping[str, Any], task: str) -> int:
    """Documents of a task, or of all tasks in a group."""
    counts: Mapping[str, Any] = found["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    inner: Sequence[str] = found.get("group_subtasks", {}).get(task, ())
    return sum(_samples(found, name) for name in inner)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return (text or type(error).__name__)[:_SHOWN]
