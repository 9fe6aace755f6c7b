"""Progress for people: one line on stderr with the time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Counts finished steps; the default one says nothing."""

    def step(self, what: str) -> None:
        """One more step is finished."""


class BarProgress(Progress):
    """A tqdm bar on stderr."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def step(self, what: str) -> None:
        """One more step is finished."""
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()


@contextmanager
def bar(total: int, title: str, quiet: bool = False) -> Iterator[Progress]:
    """Progress of `total` steps as a bar with the time left; nothing when quiet."""
    if quiet:
        yield Progress()
        return
    from tqdm import tqdm

    with tqdm(
        total=total, desc=title, file=sys.stderr, unit="step", dynamic_ncols=True, mininterval=0.5
    ) as shown:
        yield BarProgress(shown)
