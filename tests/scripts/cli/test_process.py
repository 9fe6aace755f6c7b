"""The command as a process: settings of the libraries that it loads, and signals."""

import os
import signal
import time

import pytest

from dbrx_quant.scripts.cli import main as main_module
from dbrx_quant.scripts.cli.main import main


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, spins, monkeypatch, capsys):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["completion", "bash"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_a_library_turns_into_another_error_is_a_stop(number):
    def read():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except BaseException as stop:
            raise RuntimeError("the shape of what was read is unknown") from stop

    before = signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, main_module._Terminated)), main_module._terminable():
        read()
    with pytest.raises(RuntimeError), main_module._terminable():
        raise RuntimeError("of the program itself")
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("setting", "ours"), [("MKL_CBWR", "AUTO"), ("THP_MEM_ALLOC_ENABLE", "1")], ids=["order", "pages"]
)
@pytest.mark.parametrize("given", [None, "0"], ids=["unset", "set"])
def test_libraries_get_settings_unless_the_user_has_made_them(setting, ours, given, monkeypatch):
    monkeypatch.setenv(setting, given or "")
    if given is None:
        monkeypatch.delenv(setting)
    assert main(["completion", "bash"]) == 0
    assert os.environ[setting] == (given or ours)
