"""What a verb of the command consists of, and the arguments and values that several verbs share.

Everything here is imported for `--help`, so it imports nothing heavy.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOWEST_BPW, HIGHEST_BPW = 2.0, 8.5  # what the format's widths allow; a model's own range is narrower

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LEAST_BARE_SIZE = 1_000_000  # a smaller number without a unit is a forgotten unit


class UsageError(ValueError):
    """Arguments that do not go together."""


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Attributes:
        name: as typed.
        summary: one line for the list of verbs and the head of its help.
        example: a command line that works, for its help.
        add_arguments: declares its arguments.
        run: does it; returns the exit code. Imports what it needs when it is called.
        resumable: whether the same command goes on after an interruption.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    resumable: bool = False


def size(text: str) -> int:
    """Bytes from `40GB` (10^9 each) or `22GiB` (2^30 each); a number without a unit is bytes.

    Raises:
        ArgumentTypeError: it is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 40GB, 22.5GB or 22GiB")
    number, prefix, binary, _ = match.groups()
    if binary and not prefix:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 40GB, 22.5GB or 22GiB")
    value = int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])
    if not prefix and value < _LEAST_BARE_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is {value} bytes; for gigabytes write {number}GB")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a size of nothing; write it like 40GB or 22GiB")
    return value


def bpw_list(text: str) -> tuple[float, ...]:
    """Targets in bits per weight from `3.0` or `2.25,3.0,4.25`.

    Raises:
        ArgumentTypeError: one is no number, outside what the format allows, or there twice.
    """
    targets: list[float] = []
    for part in text.split(","):
        try:
            target = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is no number; write 3.0 or 2.25,3.0,4.25") from None
        if not LOWEST_BPW <= target <= HIGHEST_BPW:
            raise argparse.ArgumentTypeError(
                f"{part.strip()} bits per weight; the format has {LOWEST_BPW:g} to {HIGHEST_BPW:g}"
            )
        if target in targets:
            raise argparse.ArgumentTypeError(f"{target} is there twice")
        targets.append(target)
    return tuple(targets)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def temperature(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return value


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_quiet_argument(parser: argparse._ActionsContainer) -> None:
    """`--quiet`, of the verbs that can take minutes."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """What `convert` and `measure` have in common: calibration, work folder, machine."""
    texts = parser.add_argument_group("calibration")
    texts.add_argument(
        "--calibration",
        metavar="NAME|FILE",
        default="default",
        help="'default' (a mix from the Hub), 'offline' (text of the Python installation), a .txt, .jsonl, "
        ".parquet or tokens .safetensors file, or a dataset org/name[:config[:split[:column]]]",
    )
    texts.add_argument("--rows", type=positive, help="calibration rows (default: 128)")
    texts.add_argument("--length", type=positive, help="tokens a row (default: 2048 or the model's most)")
    texts.add_argument("--seed", type=natural, default=0, help="of everything drawn (default: %(default)s)")
    texts.add_argument(
        "--held-out",
        metavar="NAME|FILE",
        help="text of the kind the model is for, to predict and measure the KL on; like --calibration, but "
        "never calibrated on (default: one calibration row in seven)",
    )
    texts.add_argument(
        "--held-out-rows", type=positive, metavar="N", help="rows of --held-out (default: 16; of tokens all)"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--work-dir", type=Path, metavar="DIR", help="for resuming (default: OUT.work)")
    work.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto goes on with earlier work, must insists on it, never discards it (default: %(default)s)",
    )
    work.add_argument(
        "--effort",
        choices=("fast", "default", "best"),
        default="default",
        help="how long to look for the best codes and scales; fast is half the work (default: %(default)s)",
    )
    work.add_argument("--max-memory", type=size, metavar="SIZE", help="refuse to start above it, e.g. 24GB")
    work.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    add_quiet_argument(work)
