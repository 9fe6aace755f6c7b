"""Who takes the experts of a block: this process alone, or several workers that share them out.

What is done at an expert's turn is a task. It depends on nothing that another expert's task makes, but for
files that are waited for, so it may be done by anybody, in any order; results are used in the experts' order.
That is why any number of workers ends with the same bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dbrx_quant.calibration.blocks.model import Routing
from dbrx_quant.calibration.blocks.walk import Turn
from dbrx_quant.runtime.output.progress import Progress

Result = Mapping[str, Tensor]


@dataclass(frozen=True)
class Description:
    """A task in words, numbers and tensors, from which another process makes the same task.

    Attributes:
        kind: of the task.
        block: whose experts they are.
        facts: JSON-ready.
        tensors: by name, the routing aside.
        files: sealed ones of the work folder that it reads, as far as they are there.
        paths: other places in the work folder, by name.
    """

    kind: str
    block: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    files: Sequence[Path] = ()
    paths: Mapping[str, Path] = field(default_factory=dict)


class Task(Protocol):
    """What is done at the turns of a block's experts."""

    @property
    def routing(self) -> Routing:
        """Of all tokens, with the experts' inputs."""
        ...

    def do(self, turn: Turn) -> Result:
        """Do it for one expert."""
        ...

    def products(self, turn: Turn) -> Sequence[Path]:
        """The files of the work folder that it leaves."""
        ...

    def only_here(self, turn: Turn) -> bool:
        """Whether it needs what only the process that drives the conversion has."""
        ...

    def described(self) -> Description:
        """What others make it of."""
        ...


class Signals(Protocol):
    """How tasks of one block wait for each other."""

    def wait_for(self, path: Path) -> None:
        """Return when a file is there that the task of an earlier expert makes."""
        ...

    def announce(self, path: Path) -> None:
        """Say that a file is there for which others may wait."""
        ...


class Crew(Signals, Protocol):
    """The workers of a conversion, as the one that drives it sees them."""

    def each(self, task: Task, turns: Iterable[Turn]) -> Iterator[tuple[Turn, Result]]:
        """Have a task done for experts of one block; yields turns and results in their order."""
        ...

    def note(self, what: str) -> None:
        """Note what the process that drives the conversion is at, for those who wait for it."""
        ...


class Alone:
    """One process, which does everything itself, one expert after another."""

    def each(self, task: Task, turns: Iterable[Turn]) -> Iterator[tuple[Turn, Result]]:
        """Do a task for each of the experts."""
        for turn in turns:
            yield turn, task.do(turn)

    def wait_for(self, path: Path) -> None:
        """It is there: experts are taken in order."""

    def announce(self, path: Path) -> None:
        """Nobody waits."""

    def note(self, what: str) -> None:
        """Nobody waits."""


class NotedProgress(Progress):
    """Progress that a crew is told of, too."""

    def __init__(self, shown: Progress, crew: Crew) -> None:
        self._shown, self._crew = shown, crew

    def step(self, what: str) -> None:
        """Count one more finished step."""
        self._shown.step(what)
        self._crew.note(f"after {what}")
