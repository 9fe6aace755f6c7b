"""The package's C libraries: each is located, checked and typed at first use."""

import ctypes
import importlib.resources
import threading
from dataclasses import dataclass, field
from pathlib import Path

from dbrx_quant.runtime.library._abi import ABI_VERSION, Signatures


@dataclass
class SharedLibrary:
    """One library beside the package's Python files.

    Attributes:
        file: its file name.
        title: what it is, for messages.
        compiler: what an installation that has it needs, for messages.
        version_function: the function that says its ABI version.
        functions: all functions that are called.
        version: the ABI version required.
        loaded: the typed library once it is there.
    """

    file: str
    title: str
    compiler: str
    version_function: str
    functions: Signatures
    version: int = ABI_VERSION
    loaded: ctypes.CDLL | None = field(default=None, init=False)
    _failure: str | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def find(self) -> Path:
        """Where the installed library is.

        Raises:
            RuntimeError: it is missing; the message says which compiler an installation with it needs.
        """
        root = importlib.resources.files("dbrx_quant.runtime")  # several folders in an editable install
        candidate = root.joinpath(self.file)
        if candidate.is_file():
            return Path(str(candidate))
        raise RuntimeError(
            f"{self.file} is not beside dbrx_quant.runtime ({root}); install again with {self.compiler}"
        )

    def load(self, path: Path) -> ctypes.CDLL:
        """The library at `path`, typed.

        Raises:
            RuntimeError: it does not load, is another library, or has another ABI version.
        """
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"{path} cannot be loaded: {error}") from error
        try:
            found = int(getattr(handle, self.version_function)())
        except AttributeError as error:
            raise RuntimeError(f"{path} is not {self.title}: {error}") from error
        if found != self.version:
            needed = self.version
            raise RuntimeError(
                f"{path} has ABI version {found}, this package needs {needed}; install the package again"
            )
        for name, (result, arguments) in self.functions.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
        return handle

    def get(self) -> ctypes.CDLL:
        """The installed library, or the one that `use` set.

        Raises:
            RuntimeError: `find` or `load` failed; remembered once it happened.
        """
        if self.loaded is None:
            with self._lock:
                if self._failure is not None:
                    raise RuntimeError(self._failure)
                if self.loaded is None:
                    try:
                        self.loaded = self.load(self.find())
                    except RuntimeError as error:
                        self._failure = str(error)
                        raise
        return self.loaded

    def use(self, path: Path) -> None:
        """Use the library at `path` instead of the installed one: for benchmarks and tests.

        Raises:
            RuntimeError: `load` refuses it.
        """
        self.loaded = self.load(path)

    def why_unavailable(self) -> str | None:
        """The reason why the library cannot be used, or None when it can."""
        try:
            self.get()
        except RuntimeError as error:
            return str(error)
        return None
