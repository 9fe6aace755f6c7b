"""Fixtures that several test files share."""

import ctypes
import os
import signal

import emulator_build
import pytest
import torch
from places import GOLDEN, SHARED

import oracles_ops
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.library import _cuda, _native

# Tests compare to the last digits; those of rounded products ask for them.
os.environ["DBRXQ_PRODUCTS"] = "float32"

# A shell that starts the suite in the background has it ignore Ctrl-C, and its child processes with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        if GOLDEN:
            metafunc.parametrize("golden_file", GOLDEN, ids=lambda path: path.stem)
        else:
            skip = pytest.mark.skip(reason="no golden vectors: ../shared/golden is absent")
            metafunc.parametrize("golden_file", [pytest.param(None, marks=skip)])


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


@pytest.fixture(autouse=True)
def exact_activations():
    """Tests compare to the last digits; those of the integer kernels switch them on themselves."""
    with use_activations("float"):
        yield


@pytest.fixture
def seeded():
    """torch's random numbers are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For thousands of small operations, which threads only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=oracles_ops.ISAS)
def isa(request):
    """Each instruction set that the machine has."""
    try:
        with _native.forced_isa(request.param):
            yield request.param
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def emulated_library():
    """The CUDA library compiled for the host."""
    path = emulator_build.build(sanitized=os.environ.get("DBRXQ_EMULATOR") == "sanitized")
    if path is None:
        pytest.skip("the emulator needs g++")
    return _cuda.load(path)


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """The emulated library in place of the real one, with one schedule of its threads."""
    torch.manual_seed(0)
    monkeypatch.setattr(_cuda.LIBRARY, "loaded", emulated_library)
    emulated_library.dbrxq_emulator_seed(ctypes.c_uint64(0))
    return emulated_library
