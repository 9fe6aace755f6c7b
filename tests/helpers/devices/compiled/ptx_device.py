"""The CUDA backend of the runtime on the interpreter: real host code, its launches run from PTX.

Kernels and their arguments are known by name and bytes alone, so that nothing here changes with them.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import re

from ptx_build import Built
from ptx_machine import Machine
from ptx_memory import watched
from ptx_text import PtxError

from dbrx_quant.runtime.library import _cuda

_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_ulong,
)
_FAILED = 719  # cudaErrorLaunchFailure


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name in the PTX, its grid and block."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


class Device:
    """A GPU of a target that nvcc has built for.

    Attributes:
        machine: what runs the kernels.
        launches: all so far.
    """

    def __init__(self, built: Built):
        self.built = built
        self.machine = Machine(built.texts(), built.target)
        self.launches = []
        self.library = _cuda.load(built.library)
        self._hook = _HOOK(self._launch)
        self._error = None

    @contextlib.contextmanager
    def running(self, multiprocessors=3):
        """The backend's library is this device's, and tensors are watched, within the context.

        Raises:
            PtxError: a kernel did what it must not, in place of the backend's error.
        """
        before = _cuda.LIBRARY.loaded
        ctypes.c_void_p.in_dll(self.library, "stub_hook").value = ctypes.cast(
            self._hook, ctypes.c_void_p
        ).value
        ctypes.c_int.in_dll(self.library, "stub_multiprocessors").value = multiprocessors
        ctypes.c_int.in_dll(self.library, "stub_capability").value = self.built.target
        _cuda.LIBRARY.loaded = self.library
        self._error = None
        try:
            with watched(self.machine.memory):
                yield self
        except RuntimeError as error:
            if self._error is None:
                raise
            raise self._error from error
        finally:
            _cuda.LIBRARY.loaded = before

    def _launch(self, name, sizes, arguments, dynamic):
        """Called by the host code; exceptions cannot pass through it."""
        if self._error is not None:
            return _FAILED
        try:
            kernel = name.decode()
            grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
            self.launches.append(Launch(kernel, grid, block))
            given = self._arguments(kernel, arguments)
            self.machine.launch(kernel, grid, block, given, dynamic)
        except PtxError as error:
            self._error = error
            return _FAILED
        except BaseException as error:
            self._error = PtxError(f"{name.decode()}: the interpreter failed: {error!r}")
            self._error.__cause__ = error
            return _FAILED
        return 0

    def _arguments(self, kernel, arguments):
        """The bytes of a kernel's parameters."""
        layout = self.machine.program(kernel).kernel
        block = bytearray(layout.parameter_bytes)
        starts = [*layout.parameters.values(), layout.parameter_bytes]
        for i, (first, end) in enumerate(itertools.pairwise(starts)):
            size = min(end - first, layout.sizes[i])
            block[first : first + size] = ctypes.string_at(arguments[i], size)
        return bytes(block)


def short_name(kernel):
    """A kernel's name with its template arguments, for people: gemv_kernel<1, 2>."""
    found = re.search(r"\d+([a-z]\w*?_kernel)(?:I((?:L[a-z]\d+E)+)E)?", kernel)
    if found is None:
        return kernel
    arguments = re.findall(r"L[a-z](\d+)E", found[2] or "")
    return re.sub(r"^.*\d(?=[a-z])", "", found[1]) + (f"<{', '.join(arguments)}>" if arguments else "")
