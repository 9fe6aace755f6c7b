"""Fixtures that several test files share."""

from pathlib import Path

import pytest

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
