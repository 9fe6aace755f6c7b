"""What a verb of the command consists of."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


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
