"""What the command says when something goes wrong: one line and an exit code."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from cli_runs import run, spawn
from tiny_output import make_output

from dbrx_quant import scripts
from dbrx_quant.quantize import conversion as converting
from dbrx_quant.scripts.cli import doctor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small source and a randomly quantized output of it."""
    folder = tmp_path_factory.mktemp("cli")
    make_output(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "no/such/model", "out", "--bpw", "3"],
        ["measure", "no/such/model", "-o", "m.json"],
        ["inspect", "no/such/model"],
        ["eval", "no/such/model", "--reference", "x", "--text", "y"],
        ["generate", "no/such/model", "prompt"],
    ],
)
def test_an_error_is_one_line_on_stderr(command, capsys):
    for extra in ([], ["--json"]):
        code, out, err = run(capsys, *command, *extra)
        assert (code, out) == (1, "")
        assert err == "dbrx-quant: error: no/such/model: no such folder\n"


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "inspect", "no/such/model", "--debug")
    assert code == 1
    assert err.startswith("Traceback")
    assert "CheckpointError" in err


def convert_that(monkeypatch, action):
    monkeypatch.setattr(converting, "convert", action)


def test_a_full_disk_is_one_line(monkeypatch, folders, tmp_path, capsys):
    def fail(options):
        raise OSError(errno.ENOSPC, "disk full: 12 bytes required, 3 free", str(tmp_path / "x"))

    convert_that(monkeypatch, fail)
    code, out, err = run(capsys, "convert", folders / "source", tmp_path / "o", "--bpw", "3")
    assert (code, out) == (1, "")
    assert err == f"dbrx-quant: error: {tmp_path / 'x'}: disk full: 12 bytes required, 3 free\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize(
    ("resume", "hint"),
    [
        ("auto", "run the same command again to continue"),
        ("never", "run it again with --resume auto to continue"),
    ],
)
def test_an_interruption_is_one_line(number, code, resume, hint, monkeypatch, folders, tmp_path, capsys):
    unwound = []

    def wait(options):
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            unwound.append(True)

    convert_that(monkeypatch, wait)
    command = ("convert", folders / "source", tmp_path / "o", "--bpw", "3", "--resume", resume)
    before = signal.getsignal(signal.SIGTERM)
    assert run(capsys, *command) == (code, "", f"dbrx-quant: interrupted; {hint}\n")
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_verbs_that_cannot_go_on_only_say_that_they_were_interrupted(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert run(capsys, "doctor") == (130, "", "dbrx-quant: interrupted\n")


SCRIPTS = [path for path in Path(scripts.__path__[0]).rglob("*.py") if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("module", ["cli.main", "dev.dbrx_sizes"])
def test_a_reader_that_leaves_early_is_no_error(folders, module):
    process = spawn(*(["inspect", folders / "out"] if module == "cli.main" else []), "--json", module=module)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 1
    assert err == ""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_quiet_on_a_closed_pipe(path):
    assert "@quiet_on_closed_pipe\ndef main(" in path.read_text("utf-8")


def test_outputs_that_cannot_be_written_are_told_before_anything_is_read(tmp_path, capsys):
    page, cache = tmp_path / "no" / "x.html", tmp_path / "cache"
    assert run(capsys, "report", "nowhere", "-o", page)[0::2] == (
        1,
        f"dbrx-quant: error: {page}: there is no folder {page.parent}; make it first\n",
    )
    arguments = ("eval", "nowhere", "--text", "x.txt", "--cache", cache)
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (1, f"dbrx-quant: error: {cache}: no such folder; fill it with --reference MODEL\n")
    cache.write_text("precious")
    code, _, err = run(capsys, *arguments, "--reference", "nowhere")
    assert (code, err) == (1, f"dbrx-quant: error: {cache}: File exists\n")
