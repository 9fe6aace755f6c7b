"""The chat: what its lines do, what it prints where, and a session at a terminal."""

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from scripted_model import byte_ids, scripted_folder
from tiny_output import TOKENIZER_CONFIG, make_output, make_tokenizer

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.talk.conversation import Answer, Conversation
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.scripts.cli.main import main
from dbrx_quant.scripts.terminal.chat_screen import TerminalScreen
from dbrx_quant.scripts.terminal.chat_session import COMMANDS, Session, summary

SCRIPT = "Hi_you!🙂"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scripted_folder(tmp_path_factory.mktemp("scripted") / "model", SCRIPT)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder), load_tokenizer(folder)


class Recorder:
    """A screen that remembers."""

    def __init__(self):
        self.notes, self.problems, self.answers = [], [], []

    def note(self, text):
        self.notes.append(text)

    def problem(self, text):
        self.problems.append(text)

    @contextlib.contextmanager
    def answer(self):
        pieces = []
        yield pieces.append
        self.answers.append("".join(pieces))


@pytest.fixture
def screen():
    return Recorder()


@pytest.fixture
def session(loaded, screen):
    return Session(Conversation(*loaded), screen)


def test_a_line_is_a_message(session, screen):
    assert session.handle("Hello\n")
    assert screen.answers == [SCRIPT]
    assert session.conversation.messages[0] == {"role": "user", "content": "Hello"}
    assert screen.notes[0].startswith("12 tokens, ")
    assert "tokens/s" in screen.notes[0]


def test_an_empty_line_is_nothing(session, screen):
    assert session.handle("  \n")
    assert (screen.answers, screen.notes, session.conversation.messages) == ([], [], [])


def test_two_slashes_send_one(session):
    session.handle("//help me")
    assert session.conversation.messages[0]["content"] == "/help me"


def test_help_tells_every_command(session, screen):
    session.handle("/help")
    for name, (_, what) in COMMANDS.items():
        assert name in screen.notes[0]
        assert what in screen.notes[0]


def test_every_command_but_quit_goes_on(session, tmp_path):
    session.handle("Hello")
    values = {"/temp": "0", "/tokens": "5", "/save": f"{tmp_path}/a.json", "/load": f"{tmp_path}/a.json"}
    for name in ("/save", *(name for name in COMMANDS if name not in ("/save", "/quit"))):
        assert session.handle(f"{name} {values.get(name, '')}")
    assert not session.handle("/quit")


def test_undo_and_retry(session, screen):
    session.handle("one")
    session.handle("two")
    session.handle("/undo")
    assert screen.notes[-1] == "taken back: two"
    assert [m["content"] for m in session.conversation.messages] == ["one", SCRIPT]
    session.handle("/retry")
    assert screen.answers == [SCRIPT] * 3
    session.handle("/undo")
    session.handle("/undo")
    assert screen.problems == ["there is no message yet"]


def test_settings_are_set_and_told(session, screen):
    session.handle("/temp 0.5")
    session.handle("/tokens 3")
    session.handle("/system Be kind.")
    conversation = session.conversation
    assert (conversation.temperature, conversation.max_new_tokens) == (0.5, 3)
    assert conversation.system == "Be kind."
    session.handle("/system")
    session.handle("/system -")
    assert conversation.system is None
    assert screen.notes == [
        "temperature 0.5",
        "answers of up to 3 tokens",
        "system prompt: Be kind.",
        "system prompt: Be kind.",
        "no system prompt",
    ]
    session.handle("hello")
    assert screen.notes[-1].endswith("cut off: /tokens N allows more")


def test_a_conversation_is_saved_and_loaded(session, screen, tmp_path):
    session.handle("/system Be kind.")
    session.handle("Hellö")
    session.handle(f"/save {tmp_path}/my talk.json")
    saved = json.loads((tmp_path / "my talk.json").read_text(encoding="utf-8"))
    assert [m["content"] for m in saved["messages"]] == ["Be kind.", "Hellö", SCRIPT]
    session.handle("/reset")
    assert session.conversation.messages == []
    session.handle(f"/load {tmp_path}/my talk.json")
    assert session.conversation.all_messages() == saved["messages"]
    assert screen.notes[-1] == f"1 turn from {tmp_path}/my talk.json"
    (tmp_path / "list.json").write_text(json.dumps(saved["messages"]))
    session.handle(f"/load {tmp_path}/list.json")
    assert screen.problems == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/frobnicate", "/frobnicate is not a command; /help shows them, //frobnicate sends it"),
        ("/temp", "/temp X: sample at temperature"),
        ("/temp hot", "'hot': expected a number"),
        ("/tokens 0", "'0': expected a whole number of at least 1"),
        ("/save", "/save FILE"),
        ("/save /none/where.json", "/none: no such folder"),
        ("/load /none/where.json", "/none/where.json: No such file"),
        ("/retry", "there is no message yet"),
        ("x" * 300, "the model takes 128"),
    ],
)
def test_what_goes_wrong_is_told_and_the_chat_goes_on(session, screen, line, message):
    assert session.handle(line)
    assert len(screen.problems) == 1
    assert message in screen.problems[0]
    session.handle("Hello")
    assert screen.answers[-1] == SCRIPT


@pytest.mark.parametrize("content", ["{", "3", '{"a": 1}', "[1]", '[{"role": "user", "content": "a"}]'])
def test_files_that_are_not_conversations_are_refused(session, screen, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    session.handle(f"/load {tmp_path}/a.json")
    assert len(screen.problems) == 1
    assert session.conversation.messages == []


def test_dropped_turns_are_reported(session, screen):
    for number in range(4):
        session.handle(f"a long message, number {number}")
    told = [note for note in screen.notes if "no longer visible" in note]
    assert told
    assert told[0] == "the oldest turn is no longer visible: the model takes 128 tokens"


def test_a_summary_has_what_there_is_to_tell():
    answer = Answer("a", 1, "interrupted", 30, 10, 0, 0.5, 0.5)
    assert summary(answer) == "1 token, first after 0.5 s, prompt 30 (10 cached), stopped"


# --- the verb, without a terminal ---


def chat(folder, monkeypatch, capsys, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = main(["chat", str(folder), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_piped_lines_are_answered_on_stdout_and_the_rest_is_on_stderr(folder, monkeypatch, capsys):
    lines = "Hello\n/temp 0\n/nope\nagain"
    code, out, err = chat(folder, monkeypatch, capsys, lines, "--system", "Be kind.")
    assert code == 0
    assert out == f"{SCRIPT}\n{SCRIPT}\n"
    notes = [line for line in err.splitlines() if "Loading" not in line]
    assert [note.split(",")[0] for note in notes] == [
        "12 tokens",
        "temperature 0",
        "dbrx-quant chat: /nope is not a command; /help shows them",
        "12 tokens",
    ]


def test_quit_leaves_the_lines_behind_it(folder, monkeypatch, capsys):
    assert chat(folder, monkeypatch, capsys, "/quit\nHello\n")[1] == ""


def test_json_tells_the_whole_conversation(folder, monkeypatch, capsys):
    code, out, _ = chat(folder, monkeypatch, capsys, "a\nb\n", "--json", "--system", "s")
    told = json.loads(out)
    assert code == 0
    assert [m["content"] for m in told["messages"]] == ["s", "a", SCRIPT, "b", SCRIPT]
    assert [answer["stopped"] for answer in told["answers"]] == ["turn", "turn"]
    assert told["answers"][1]["reused"] > 0


def test_chat_refuses_a_model_without_a_template(tmp_path, monkeypatch, capsys):
    out = make_output(tmp_path)
    (out / "chat_template.jinja").unlink()
    config = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "chat_template"}
    make_tokenizer(out, config=config)
    code, _, err = chat(out, monkeypatch, capsys, "Hello\n")
    assert code == 1
    assert "no chat template; 'dbrx-quant generate' continues a text" in err


# --- the screen ---


def test_markdown_appears_whole_whatever_pieces_it_comes_in():
    console_module = pytest.importorskip("rich.console")
    text = "# Title\n\nSome **bold** words and `code`.\n\n" + "".join(
        f"{i}. item {i}\n" for i in range(1, 60)
    )
    console = console_module.Console(file=io.StringIO(), force_terminal=True, width=60, height=12)
    screen = TerminalScreen(console, markdown=True)
    import dbrx_quant.scripts.terminal.chat_screen as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_REFRESH_SECONDS", 0)
        patch.setattr(module, "_PAUSE", 0)
        with screen.answer() as write:
            for start in range(0, len(text), 7):
                write(text[start : start + 7])
    shown = "\n".join(terminal(console.file.getvalue(), 60, 12))
    for number in range(1, 60):
        assert shown.count(f"item {number}\n") == 1, number
    assert "**" not in shown


def terminal(output, columns, rows):
    """The lines that a terminal shows, those that have scrolled away included."""
    pyte = pytest.importorskip("pyte", reason="a terminal to look at: pip install pyte")
    screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n").replace("\r\r\n", "\r\n"))
    above = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in (*above, *screen.display)] + [""]


# --- a session at a terminal ---


class Terminal:
    """A command on a pseudo-terminal, and what its screen shows."""

    def __init__(self, *arguments):
        import pyte

        self.screen = pyte.Screen(120, 40)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dbrx_quant.scripts.cli.main", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": ""},
        )
        os.close(slave)

    def type(self, text):
        os.write(self._master, text.encode())

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, seconds=0.05):
        ready, _, _ = select.select([self._master], [], [], seconds)
        if ready:
            with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
                self._stream.feed(os.read(self._master, 65536))

    def wait(self, condition, seconds=60):
        if isinstance(condition, str):
            wanted = condition
            condition = lambda text: wanted in text  # noqa: E731
        deadline = time.monotonic() + seconds
        while not condition(self.text()):
            assert time.monotonic() < deadline, self.text()
            assert self.process.poll() is None, self.text()
            self.read()

    def close(self):
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        os.close(self._master)
        return self.process.wait()


def test_a_session_at_a_terminal(tmp_path):
    """Answers, history, a Ctrl-C that ends an answer, one at the prompt, the end of the input."""
    pytest.importorskip("pyte", reason="a terminal to look at: pip install pyte")
    folder = scripted_folder(
        tmp_path / "rounds", "🙂abc", then=byte_ids("a")[0], context=100_000
    )  # goes round for ever
    term = Terminal("chat", str(folder), "--max-new-tokens", "9")
    try:
        term.wait("/help shows the commands")
        term.wait("\n>")
        term.type("Hello\r")
        term.wait("🙂")
        term.wait("cut off: /tokens N allows more")
        assert "abcab" in term.text()
        term.type("/tokens 90000\r")
        term.wait("answers of up to 90000 tokens")
        term.type("\x1b[A\x1b[A")  # twice up: the line before
        term.wait(lambda text: text.rstrip().endswith("> Hello"))
        term.type("\r")
        term.wait("abcabcabcabcabcabc")
        term.type("\x03")
        term.wait("stopped")
        term.wait(lambda text: text.rstrip().endswith("\n>"))  # until then Ctrl-C leaves
        assert term.text().count("🙂abcabcabc") == 1, "what was drawn before is gone"
        term.type("/temp 9\x03")
        term.wait("Ctrl-D or /quit leaves")
        assert "temperature 9" not in term.text()
        term.type("/temp 0\\\r")
        term.wait("\n…")
        term.type("\r")
        term.wait("temperature 0")
        term.type("\x04")
        assert term.close() == 0
    finally:
        if term.process.poll() is None:
            term.close()
