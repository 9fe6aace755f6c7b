"""Progress for people: one line on stderr with the time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Counts finished steps; this base class shows nothing."""

    def step(self, what: str) -> None:
        """Count one more finished step."""


class BarProgress(Progress):
    """A tqdm bar on stderr."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def step(self, what: str) -> None:
        """Count one more finished step."""
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()


@contextmanager
def bar(total: int, title: str, quiet: bool = False) -> Iterator[Progress]:
    """Progress in `total` named steps as a bar with the time left; nothing when quiet."""
    if quiet:
        yield Progress()
        return
    with _tqdm(title, total, "step", mininterval=0.5) as shown:
        yield BarProgress(shown)


@contextmanager
def counter(title: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that shows progress as a bar with the time left; nothing when quiet."""
    if quiet:
        yield lambda done, total: None
        return
    bars: list[Any] = []  # created by the first call: the total isn't known before, and there may be none

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(_tqdm(title, total, unit, unit_scale=unit == "B"))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for shown in bars:
            shown.close()


def _tqdm(title: str, total: int, unit: str, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(desc=title, total=total, unit=unit, file=sys.stderr, dynamic_ncols=True, **options)
