"""`evaluation.json` of a quantized folder: what was measured of it, an entry for each text and windows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.json_file import JsonFile, is_number
from dbrx_quant.runtime.files.lock import locked

EVALUATION_NAME = "evaluation.json"
_FILE = JsonFile("a list of evaluations", version=1, remedy="delete the file and evaluate again")
_PATIENCE = 10.0  # seconds

_KEY = ("text", "windows", "length")  # what tells entries apart
_WHOLE = ("windows", "length", "tokens")
_NUMBERS = ("kl", "top1", "bpw")
_NUMBERS_OR_NULL = ("ppl", "ppl_original", "kl_stderr", "router_topk")
_NAMES = ("text", *_WHOLE, *_NUMBERS, *_NUMBERS_OR_NULL)

Evaluation = Mapping[str, Any]


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's `evaluation.json`, in order of text, windows and length; none without it.

    An entry has `text` (a name), `windows`, `length` and `tokens`, `ppl` and `ppl_original` (null: beyond
    1e308), `kl` in nats and `kl_stderr` (null for a single window), `top1`, `router_topk` (mean over the
    blocks, null without experts) and `bpw`.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    try:
        fields = _FILE.read(Path(folder) / EVALUATION_NAME)
    except FileNotFoundError:
        return []
    entries = []
    for at, entry in enumerate(fields.items("evaluations")):
        if fault := _fault(entry):
            raise fields.fault(f"evaluations[{at}]", fault)
        entries.append(entry)
    return sorted(entries, key=_key)


def save_evaluation(folder: Path, entry: Evaluation) -> Path:
    """Put an entry into a folder's `evaluation.json`, in place of one of the same text and windows.

    Raises:
        CheckpointError: the file that is there cannot be read.
        ValueError: the entry lacks a figure, or has one that is not a number; or another process goes on
            working in the folder.
        OSError: the folder cannot be written.
    """
    fault = _fault(entry)
    if fault:
        raise ValueError(f"{EVALUATION_NAME}: {fault}")
    path = Path(folder) / EVALUATION_NAME
    with locked(Path(folder), _PATIENCE):  # or one of two evaluations that end together would be lost
        kept = [other for other in read_evaluations(folder) if _key(other) != _key(entry)]
        entries = sorted([*kept, {name: entry[name] for name in _NAMES}], key=_key)
        _FILE.write(path, {"evaluations": entries})
    return path


def ppl_text(value: float | None) -> str:
    """A perplexity as people read it; None is beyond what a float holds."""
    if value is None:
        return "> 1e308"
    return f"{value:.3f}" if value < 1e6 else f"{value:.3g}"


def _key(entry: Evaluation) -> tuple[Any, ...]:
    return tuple(entry[name] for name in _KEY)


def _fault(entry: Any) -> str | None:
    """What is wrong with an entry, or None."""
    if not isinstance(entry, Mapping):
        return f"{type(entry).__name__}, expected an object"
    for name in _NAMES:
        if name not in entry:
            return f"without {name}"
        value = entry[name]
        if name == "text":
            fine = isinstance(value, str)
        elif name in _WHOLE:
            fine = type(value) is int and value > 0
        else:
            fine = is_number(value) or (value is None and name in _NUMBERS_OR_NULL)
        if not fine:
            return f"invalid: {name} is {value!r}"
    return None
