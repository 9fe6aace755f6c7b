"""What the command prints: results on stdout, for people or as JSON; remarks on stderr."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from dbrx_quant.runtime.output.redact import redact
from dbrx_quant.scripts.terminal.door import visible

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
_PIPE_WIDTH = 200  # columns where no terminal sets them: wide enough that nothing is cut off


def quiet_on_closed_pipe(main: Callable[P, int]) -> Callable[P, int]:
    """Have a `main` return 1 silently when the reader of its output closes the pipe (`| head`)."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # it is closed
                    sys.stdout.flush()  # also what argparse has printed
        except BrokenPipeError:
            if sys.stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain
            return 1

    return run


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON cannot hold, infinite ones and NaN, are null."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """A line on stderr, for people."""
    print(visible(text), file=sys.stderr)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, note: str = ""
) -> None:
    """A table on stdout.

    Args:
        title: above it.
        columns: heads of the columns.
        rows: cells.
        left: how many columns, from the first on, stand to the left; the others to the right.
        note: a line below it.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(redact(cell))) for cell in row))
    console = stdout_console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(Text(visible(title), style="bold"), soft_wrap=True)
    console.print(table)
    if note:
        console.print(Text(visible(note)))


def stdout_console(**options: Any) -> "Console":
    """Rich's console on stdout; what it shows must be `visible`, since its own sequences pass the door."""
    from rich.console import Console

    return Console(file=getattr(sys.stdout, "drawn", None), **options)


def model_title(source: str) -> str:
    """What to call a model: the name of its folder, with the one above where that only tells the size."""
    path = Path(source)
    if not path.is_dir():
        return source  # on the Hub
    path = path.resolve()
    return f"{path.parent.name}-{path.name}" if re.fullmatch(r"[\d.]+bpw", path.name) else path.name


def bytes_text(count: float) -> str:
    """`131.9 GB`, `7.8 MB`; units of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count >= 100 * factor else 2}f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """`4.2 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def hide_loading_bar(quiet: bool) -> None:
    """Hide transformers' bar of loaded weights when quiet or where stderr is not a terminal."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
