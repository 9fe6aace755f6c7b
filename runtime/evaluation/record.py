"""`evaluation.json` of a quantized folder: what was measured of it, on texts and at tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.json_file import Fields, JsonFile, is_number
from dbrx_quant.runtime.files.lock import locked

EVALUATION_NAME = "evaluation.json"
_FILE = JsonFile("a list of evaluations", version=1, remedy="delete the file and evaluate again")
_PATIENCE = 10.0  # seconds

Evaluation = Mapping[str, Any]
Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return bool(is_number(value))


def _texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value.values()))


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


@dataclass(frozen=True)
class _Kind:
    """One kind of entries.

    Attributes:
        place: the list that holds them.
        key: fields that tell entries apart.
        fields: what each has, and what it may be.
    """

    place: str
    key: tuple[str, ...]
    fields: Mapping[str, Check]

    def key_of(self, entry: Evaluation) -> tuple[Any, ...]:
        """What tells an entry from others; null comes before all numbers."""
        return tuple((entry[name] is not None, entry[name]) for name in self.key)

    def fault(self, entry: Any) -> str | None:
        """What is wrong with an entry, or None."""
        if not isinstance(entry, Mapping):
            return f"{type(entry).__name__}, expected an object"
        for name, fine in self.fields.items():
            if name not in entry:
                return f"without {name}"
            if not fine(entry[name]):
                return f"invalid: {name} is {entry[name]!r}"
        return None

    def read(self, fields: Fields) -> list[dict[str, Any]]:
        """The entries of a file, in order of their keys."""
        entries = fields.items(self.place)
        for at, entry in enumerate(entries):
            if fault := self.fault(entry):
                raise fields.fault(f"{self.place}[{at}]", fault)
        return sorted(entries, key=self.key_of)


_TEXTS = _Kind(
    "evaluations",
    ("text", "windows", "length"),
    {
        "text": _text,
        "windows": _count,
        "length": _count,
        "tokens": _count,
        "kl": _number,
        "top1": _number,
        "bpw": _number,
        "ppl": _or_null(_number),
        "ppl_original": _or_null(_number),
        "kl_stderr": _or_null(_number),
        "router_topk": _or_null(_number),
    },
)
_TASKS = _Kind(
    "tasks",
    ("task", "metric", "filter", "fewshot", "limit", "seed"),
    {
        "task": _text,
        "version": _text,
        "metric": _text,
        "filter": _text,
        "value": _number,
        "stderr": _or_null(_number),
        "value_original": _or_null(_number),
        "stderr_original": _or_null(_number),
        "higher_is_better": _or_null(lambda value: isinstance(value, bool)),
        "fewshot": _whole,
        "samples": _whole,
        "limit": _or_null(_count),
        "seed": _whole,
        "versions": _texts,
        "bpw": _number,
    },
)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's `evaluation.json`, in order of text, windows and length; none without it.

    An entry has `text` (a name), `windows`, `length` and `tokens`, `ppl` and `ppl_original` (null: beyond
    1e308), `kl` in nats and `kl_stderr` (null for a single window), `top1`, `router_topk` (mean over the
    blocks, null without experts) and `bpw`.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    fields = _fields(folder)
    return _TEXTS.read(fields) if fields else []


def read_task_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores at tasks in a folder's `evaluation.json`; none without it.

    An entry has what `evaluation.tasks.run_tasks` gives, `value_original` and `stderr_original` (null: the
    original was not run), and `bpw`.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    fields = _fields(folder)
    return _TASKS.read(fields) if fields and _TASKS.place in fields else []


def save_evaluation(folder: Path, entry: Evaluation) -> Path:
    """Put an entry into a folder's `evaluation.json`, in place of one of the same text and windows.

    Raises:
        CheckpointError: the file that is there cannot be read.
        ValueError: the entry lacks a figure, or has one that is not a number; or another process goes on
            working in the folder.
        OSError: the folder cannot be written.
    """
    return _save(folder, _TEXTS, [entry])


def save_task_scores(folder: Path, entries: Sequence[Evaluation]) -> Path:
    """Put scores at tasks into a folder's `evaluation.json`, in place of those of the same settings.

    Raises:
        CheckpointError, ValueError, OSError: as in `save_evaluation`.
    """
    return _save(folder, _TASKS, entries)


def ppl_text(value: float | None) -> str:
    """A perplexity as people read it; None is beyond what a float holds."""
    if value is None:
        return "> 1e308"
    return f"{value:.3f}" if value < 1e6 else f"{value:.3g}"


def _fields(folder: Path) -> Fields | None:
    try:
        return _FILE.read(Path(folder) / EVALUATION_NAME)
    except FileNotFoundError:
        return None


def _save(folder: Path, kind: _Kind, entries: Sequence[Evaluation]) -> Path:
    for entry in entries:
        if fault := kind.fault(entry):
            raise ValueError(f"{EVALUATION_NAME}: {fault}")
    path, new = Path(folder) / EVALUATION_NAME, {kind.key_of(entry) for entry in entries}
    with locked(Path(folder), _PATIENCE):  # or one of two evaluations that end together would be lost
        content = {_TEXTS.place: read_evaluations(folder), _TASKS.place: read_task_scores(folder)}
        kept = [other for other in content[kind.place] if kind.key_of(other) not in new]
        made = [{name: entry[name] for name in kind.fields} for entry in entries]
        content[kind.place] = sorted([*kept, *made], key=kind.key_of)
        _FILE.write(
            path, {place: listed for place, listed in content.items() if listed or place != _TASKS.place}
        )
    return path
