"""JSON that everybody reads alike: what some readers refuse, or take for something else, is refused."""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.atomic import naming
from dbrx_quant.runtime.files.regular import at_once

LARGEST_BYTES = 1 << 30
DEEPEST = 100  # objects and lists inside of each other
_SURELY_DOUBLE = 300  # digits
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, alone or in a pair
_TOO_DEEP = f"more than {DEEPEST} objects and lists inside of each other"


def load_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is no regular file, or as in `parse_json`; the reason alone, without the path.
    """
    with naming(Path(path)), open(path, "rb", opener=at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > LARGEST_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than the {LARGEST_BYTES} of any such file")
        return parse_json(file.read())


def parse_json(data: bytes | str) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is not UTF-8 or not JSON; it has NaN or infinity, a number beyond double precision, a
            key with two different values, half a character, or too many objects and lists in each other.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_number,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _parts(outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(_TOO_DEEP)
    if _HALF_CHARACTER.search(text):  # refused by the encoder unless it is in a pair
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(text: str) -> int:
    if len(text) > _SURELY_DOUBLE:
        _number(text)
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is beyond double precision")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"{key!r} has two different values")
    return found
