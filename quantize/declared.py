"""Declarations of options, and what follows from them for the command, the work folder and the record.

Imported for `--help`, so it imports nothing heavy.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# What an option changes: the measurement and all that follows, what follows for one target, or nothing.
Changes = Literal["everything", "target", "nothing"]
Kind = Literal["whole", "size", "text", "file", "folder", "choice", "switch", "device"]

DECLARED = "declared"  # the key of a field's metadata


@dataclass(frozen=True)
class Declared:
    """What is declared of an option.

    Attributes:
        kind: of its value: a whole number, bytes, a text, a path, one of `choices`, on and off, or a device.
        help: for the command.
        changes: what of a conversion depends on it.
        group: the heading of the command's help that it stands under; "" for none.
        measuring: whether `measure` has it too.
        least: of a whole number.
        choices: that there are.
        metavar: what the help calls its value.
        names_file: whether a text may be the path of a file, whose place on this machine stays private.
        flag: the argument of the command, if it is not called as the field is.
        implied: whether records leave the default out.
    """

    kind: Kind
    help: str
    changes: Changes = "nothing"
    group: str = ""
    measuring: bool = True
    least: int = 0
    choices: tuple[Any, ...] = ()
    metavar: str | None = None
    names_file: bool = False
    flag: str | None = None
    implied: bool = False


def option(kind: Kind, help: str, default: Any = None, **more: Any) -> Any:
    """A field of a dataclass that is an option; `more` are further attributes of `Declared`."""
    return field(default=default, metadata={DECLARED: Declared(kind, help, **more)})


def flag(name: str, declared: Declared) -> str:
    """The argument of the command for an option."""
    return declared.flag or f"--{name.replace('_', '-')}"


def plain_name(source: str) -> str:
    """A source of text as others may see it: of a file, the name alone."""
    path = Path(source)
    return path.name if path.is_file() else source


def shown(value: Any, declared: Declared) -> Any:
    """A value as others may see it."""
    if isinstance(value, Path):
        return value.name
    if declared.kind == "device":
        return value.partition(":")[0]  # which of several GPUs changes nothing
    return plain_name(value) if declared.names_file and value is not None else value


def fact(value: Any, declared: Declared) -> Any:
    """A value, or what is in the file that it names."""
    from dbrx_quant.runtime.files.atomic import fingerprint

    if isinstance(value, Path) or (declared.names_file and value is not None and Path(value).is_file()):
        return fingerprint(value)
    return value


def check(name: str, value: Any, declared: Declared) -> None:
    """Raise ValueError unless a value is what is declared; None stands for the default."""
    if value is None:
        return
    if declared.kind == "choice" and value not in declared.choices:
        known = ", ".join(map(str, declared.choices))
        raise ValueError(f"{name}: {value!r}, expected one of {known}")
    if declared.kind in ("whole", "size") and not declared.least <= value < math.inf:
        raise ValueError(f"{name}: {value!r}, expected at least {declared.least}")
