"""Finding one of the package's C libraries, and loading it with the types of its functions."""

import ctypes
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def find_library(name: str, compiler: str) -> Path:
    """Where the installed library of that file name is.

    Raises:
        RuntimeError: it is not there; the message says which compiler an installation with it needs.
    """
    root = importlib.resources.files("dbrx_quant.runtime")  # several folders in an editable install
    candidate = root.joinpath(name)
    if candidate.is_file():
        return Path(str(candidate))
    raise RuntimeError(f"{name} is not beside dbrx_quant.runtime ({root}); install again with {compiler}")


def load_library(
    path: Path,
    what: str,
    version_function: str,
    version: int,
    signatures: Mapping[str, tuple[Any, list[Any]]],
) -> ctypes.CDLL:
    """The library at `path`, typed.

    Args:
        path: the file.
        what: what it should be, for the message.
        version_function: the function that tells its ABI version.
        version: the ABI version wanted.
        signatures: function → (result type, argument types), in the order of the C header.

    Raises:
        RuntimeError: it does not load, is another library, or has another ABI version.
    """
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} does not load: {error}") from error
    try:
        found = int(getattr(handle, version_function)())
    except AttributeError as error:
        raise RuntimeError(f"{path} is not {what}: {error}") from error
    if found != version:
        raise RuntimeError(
            f"{path} has ABI version {found}, this package needs {version}; install the package again"
        )
    for name, (result, arguments) in signatures.items():
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
    return handle
