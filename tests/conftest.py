"""Fixtures that several test files share."""

import signal
from pathlib import Path

import pytest

from dbrx_quant.runtime.activations import use_activations

# A shell that starts the suite in the background has it ignore Ctrl-C, and its child processes with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = sorted((SHARED / "golden").glob("*.safetensors"))


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
