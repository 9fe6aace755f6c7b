"""What passes the command's door: no secret, no control character to a terminal, no traceback."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import run
from rich.console import Console
from scripted_model import scripted_folder

from dbrx_quant.runtime.output.redact import hide, redact, redact_message
from dbrx_quant.scripts.cli import doctor
from dbrx_quant.scripts.cli.main import main
from dbrx_quant.scripts.terminal.chat_screen import TerminalScreen
from dbrx_quant.scripts.terminal.door import guarded_streams
from dbrx_quant.scripts.terminal.output import print_json, print_table, say

TOKEN = "hf_SECRETabcdefghijklmnopqrstuvwxyz12"
HOSTILE = "a\x1b]0;title\x07\x9b2Jb\rc\x7f"
SHOWN = r"a\x1b]0;title\x07\x9b2Jb\x0dc\x7f"


# --- secrets


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", TOKEN, TOKEN),
        ("HF_TOKEN", "mirror-token-without-a-form", "mirror-token-without-a-form"),
        ("HUGGING_FACE_HUB_TOKEN", "other-token-value", "other-token-value"),
        ("DBRXQ_API_KEY", "key-of-the-server", "key-of-the-server"),
        ("HF_ENDPOINT", "http://me:password1234@mirror/hf?token=querysecret", "password1234"),
        ("HTTPS_PROXY", "http://me:password1234@proxy:3128", "password1234"),
    ],
)
def test_a_secret_of_the_environment_is_in_no_output(monkeypatch, capsys, name, value, secret):
    monkeypatch.setenv(name, value)
    with guarded_streams():
        print(f"result {secret}")
        print_json({"text": f"a {secret} b"})
        print_table(secret, ["x"], [[secret]])
        say(f"message {secret}")
        logging.getLogger("a library").warning("of %s and %s", secret, Path(secret))
        print(f"{secret} at last", file=sys.stderr)
    out, err = capsys.readouterr()
    assert secret not in out + err
    assert "<token>" in out
    assert "<token>" in err


def test_the_token_files_of_the_hub_are_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    (tmp_path / "token").write_text("token-in-a-file\n")
    (tmp_path / "stored_tokens").write_text(
        "[mine]\nhf_token = stored-token-1\n\n[b]\nhf_token = stored-token-2\n"
    )
    assert redact("token-in-a-file, stored-token-1, stored-token-2") == "<token>, <token>, <token>"


def test_a_key_that_a_verb_was_given_is_hidden_as_a_word_if_it_is_short():
    hide("longkey12345")
    hide("k3y0")
    assert redact("xlongkey12345x k3y0 k3y01") == "x<token>x <token> k3y01"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"you sent Bearer {TOKEN}, no", "you sent Bearer <token>, no"),
        (f"in {TOKEN}'s place", "in <token>'s place"),
        ("GET http://hub/x?token=abc&a=b now", "GET http://hub/x?… now"),
        ("'https://me:pw@hub/x'", "'https://hub/x'"),
        ("GET /v1/models?api_key=abc HTTP/1.1", "GET /v1/models?api_key=<token> HTTP/1.1"),
        ("Authorization: Basic bWU6cHc=", "Authorization: Basic <token>"),
        ("{'authorization': 'xyz'}", "{'authorization': '<token>'}"),
        ("tokens: 128 of 256; a token= b", "tokens: 128 of 256; a token= b"),
        ("served at http://127.0.0.1:8000/v1; Ctrl-C", "served at http://127.0.0.1:8000/v1; Ctrl-C"),
    ],
)
def test_messages_lose_what_looks_like_a_secret(text, cleaned):
    assert redact_message(text) == cleaned


def test_results_keep_what_only_looks_like_a_secret(capsys):
    with guarded_streams():
        print("http://hub/x?token=abc")
    assert capsys.readouterr().out == "http://hub/x?token=abc\n"


@pytest.mark.parametrize("extra", [[], ["--debug"]])
def test_a_token_in_an_error_is_not_shown(monkeypatch, capsys, extra):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for error in (ValueError, KeyError):
        monkeypatch.setattr(doctor, "examine", fail_with(error(f"the server said {TOKEN}")))
        _, out, err = run(capsys, "doctor", *extra)
        assert TOKEN not in out + err
        assert "<token>" in err


# --- faults that nobody thought of


def fail_with(error):
    def fail(*_):
        raise error

    return fail


class Panic(BaseException):
    """What libraries in Rust raise."""


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("no"),
        OverflowError("math range error"),
        RecursionError("too deep"),
        NotImplementedError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        ExceptionGroup("several", [ValueError("a"), KeyError("b")]),
        Panic("index out of range"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_is_one_line_with_a_code_of_its_own_and_a_file_with_the_traceback(
    error, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(doctor, "examine", fail_with(error))
    code, out, err = run(capsys, "doctor")
    assert (code, out, err.count("\n")) == (70, "", 1)
    assert err.startswith(f"dbrx-quant: internal error: {type(error).__name__}")
    assert "(scripts/cli/doctor.py:" in err
    assert "please report it with the traceback in" in err
    (kept,) = tmp_path.iterdir()
    assert str(kept) in err
    assert "Traceback" in kept.read_text()
    code, out, err = run(capsys, "doctor", "--debug")
    assert (code, "Traceback" in err) == (70, True)


def test_a_fault_is_told_even_where_no_file_can_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(doctor, "examine", fail_with(KeyError("x")))
    code, _, err = run(capsys, "doctor")
    assert (code, err.count("\n")) == (70, 1)
    assert "the traceback that --debug shows" in err


def test_memory_that_is_used_up_is_an_error_and_no_fault(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", fail_with(MemoryError()))
    assert run(capsys, "doctor") == (1, "", "dbrx-quant: error: out of memory\n")


def test_numbers_that_json_cannot_hold_are_null(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"), True)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [None, True]}}


# --- text that is no Unicode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scripted_folder(tmp_path_factory.mktemp("scripted") / "model", "Hi_you!")


def test_a_prompt_that_is_no_unicode_is_refused_with_the_place(folder, capsys, monkeypatch):
    for prompt, message in (
        ("hello \udcff world", "the prompt is not UTF-8 at character 6 (byte 0xff); convert it first"),
        ("a \ud83d", "the prompt is not Unicode at character 2: \\ud83d is half a character; remove it"),
    ):
        for given, stdin in ((prompt, ""), ("-", prompt)):
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
            assert run(capsys, "generate", folder, given) == (1, "", f"dbrx-quant: error: {message}\n")


def test_bytes_on_stdin_are_refused_likewise(folder, capsys, monkeypatch):
    for verb, extra in (("generate", ["-", "--quiet"]), ("chat", [])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff\n"), encoding="utf-8"))
        _, _, err = run(capsys, verb, folder, *extra)
        assert "not UTF-8 at character 3" in err
        assert "Traceback" not in err


def test_a_file_name_that_is_no_text_can_be_told(capsys, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    code, _, err = run(capsys, "inspect", name)
    assert code == 1
    assert "\\udcff: no such folder" in err
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before, sys.stdout = sys.stdout, stream
    try:
        with guarded_streams():
            print(name, "\ud83d")
    finally:
        sys.stdout = before
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"/\\udcff \\ud83d\n")


# --- terminals and pipes


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self):
        return True


def test_a_terminal_gets_no_control_characters_of_texts_and_a_pipe_gets_them(monkeypatch, capsys):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        with guarded_streams():
            print(HOSTILE)
            print_table(HOSTILE, ["x"], [[HOSTILE]], note=HOSTILE)
        written = stream.getvalue()
        assert written.splitlines()[0] == SHOWN if stream.isatty() else HOSTILE in written
        assert "\x1b]0" not in written[len(HOSTILE) + 1 :]


def test_messages_never_hold_control_characters_but_bars_and_colours_reach_the_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with guarded_streams():
        say(HOSTILE)
        sys.stderr.write("\r 50%\x1b[A\x1b[31mred\x1b[0m\x1b[K\x1b]52;c;x\x07")
    assert terminal.getvalue() == SHOWN + "\n\r 50%\x1b[A\x1b[31mred\x1b[0m\x1b[K\\x1b]52;c;x\\x07"


def test_what_a_model_writes_cannot_drive_the_terminal(tmp_path, monkeypatch):
    folder = scripted_folder(tmp_path / "model", "i\x1b]0;x\x07!")
    for stream, expected in ((Terminal(), r"\x1b]0;x\x07!"), (io.StringIO(), "\x1b]0;x\x07!")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["generate", str(folder), "i", "--quiet"]) == 0
        assert stream.getvalue() == f"{expected}\n"


def test_what_a_model_says_in_a_chat_cannot_drive_the_terminal():
    for markdown in (True, False):
        console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
        screen = TerminalScreen(console, markdown=markdown)
        with screen.answer() as write:
            write(HOSTILE)
        screen.note(HOSTILE)
        screen.problem(HOSTILE)
        assert not {"\x1b]", "\x07", "\x9b"} & set(re.findall(r"\x1b\]|[\x07\x9b]", console.file.getvalue()))


def test_a_full_disk_behind_stdout_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dbrx_quant.scripts.cli.main", "completion", "bash"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"dbrx-quant: error: <stdout>: No space left on device\n")


def test_closed_streams_are_no_fault():
    process = subprocess.run(
        ["sh", "-c", '"$0" -m dbrx_quant.scripts.cli.main completion bash <&- >&-', sys.executable],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, b"")
