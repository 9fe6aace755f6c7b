"""Our JSON files: read with the version checked, and every field checked against its type and bounds.

A file that comes from elsewhere may hold anything. `Fields` hands out the fields of one object, checked, and
its errors name file, place, value and what was expected.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.atomic import render_json, write_json
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import load_json
from dbrx_quant.runtime.files.sealed import check_seal, seal

VERSION_KEY = "format_version"


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object.

    Attributes:
        file: where it is from, for errors.
        values: the object.
        remedy: what to do when it is wrong, the end of every error.
        place: keys that lead to the object within the file.
    """

    file: Path
    values: Mapping[str, Any]
    remedy: str
    place: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, least: int = 0) -> int:
        """A whole number of at least `least`."""
        value = self._get(key)
        if type(value) is not int or value < least:
            raise self.fault(key, f"{value!r}, expected a whole number of at least {least}")
        return value

    def number(self, key: str, least: float = -math.inf) -> float:
        """A finite number of at least `least`."""
        value = self._get(key)
        if not is_number(value) or value < least:
            bound = "" if least == -math.inf else f" of at least {least:g}"
            raise self.fault(key, f"{value!r}, expected a number{bound}")
        return float(value)

    def number_or_none(self, key: str, least: float = -math.inf) -> float | None:
        """A finite number, or null."""
        return None if self._get(key) is None else self.number(key, least)

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.fault(key, f"{value!r}, expected a string")
        return value

    def text_or_none(self, key: str) -> str | None:
        """A string, or null."""
        return None if self._get(key) is None else self.text(key)

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.fault(key, f"{type(value).__name__}, expected a list")
        return value

    def object(self, key: str) -> "Fields":
        """An object."""
        return self._nested(key, self._get(key))

    def objects(self, key: str) -> Iterator[tuple[str, "Fields"]]:
        """The entries of an object of objects, in the order of the file."""
        whole = self.object(key)
        for name, value in whole.values.items():
            yield name, whole._nested(name, value)

    def listed(self, key: str) -> Iterator["Fields"]:
        """The entries of a list of objects."""
        for at, value in enumerate(self.items(key)):
            yield self._nested(f"{key}[{at}]", value)

    def fault(self, key: str, text: str) -> CheckpointError:
        """The error of a field."""
        return CheckpointError(f"{self.file}: {self.place}{key} is {text}; {self.remedy}")

    def _nested(self, key: str, value: Any) -> "Fields":
        if not isinstance(value, dict):
            raise self.fault(key, f"{type(value).__name__}, expected an object")
        return Fields(self.file, value, self.remedy, f"{self.place}{key}: ")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise CheckpointError(f"{self.file}: {self.place}{key} is missing; {self.remedy}")
        return self.values[key]


@dataclass(frozen=True)
class JsonFile:
    """One kind of JSON file that this program writes.

    Attributes:
        what: what it holds, such as "a measurement".
        version: the version that is written and read.
        remedy: what to do about a file that cannot be read.
        unmarked: the version of files that name none; None: there are no such files.
        sealed: whether each has its checksum beside it, as files of a work folder have.
    """

    what: str
    version: int
    remedy: str
    unmarked: int | None = None
    sealed: bool = False

    def read(self, path: Path) -> Fields:
        """The file's fields.

        Raises:
            FileNotFoundError: it is not there.
            CheckpointError: it is not a JSON object, of another version, or not as it was sealed.
        """
        if self.sealed:
            check_seal(path)
        return self.check(path, read_object(path, self.what, self.remedy))

    def check(self, path: Path, content: Mapping[str, Any]) -> Fields:
        """The fields of a file's content.

        Raises:
            CheckpointError: it is of another version.
        """
        found = content.get(VERSION_KEY, self.unmarked)
        if found is None:
            raise CheckpointError(f"{path}: not {self.what} ({VERSION_KEY} is missing); {self.remedy}")
        if type(found) is not int or found != self.version:
            raise CheckpointError(
                f"{path}: {self.what} of version {found!r}, this program reads {self.version}; {self.remedy}"
            )
        return Fields(path, content, self.remedy)

    def text(self, content: Mapping[str, Any]) -> str:
        """What `write` writes."""
        return render_json({VERSION_KEY: self.version, **content}) + "\n"

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write the file, its version included, atomically."""
        write_json(path, {VERSION_KEY: self.version, **content})
        if self.sealed:
            seal(path)


def read_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = load_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not {what} ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not {what} ({type(content).__name__}, expected an object); {remedy}")
    return content


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a double can hold."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
