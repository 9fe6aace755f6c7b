"""What a line typed into the chat does: a message to the model, or a command. Knows no terminal."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from dbrx_quant.runtime.files.text import unicode_fault
from dbrx_quant.scripts.terminal.arguments import positive, temperature
from dbrx_quant.scripts.terminal.output import seconds_text

if TYPE_CHECKING:
    from dbrx_quant.runtime.talk.conversation import Answer, Conversation

T = TypeVar("T")

COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "show or set the system prompt; /system - removes it"),
    "/temp": ("X", "sample at temperature X; 0 picks the most likely token"),
    "/tokens": ("N", "the maximum length of an answer"),
    "/retry": ("", "another answer to the last message"),
    "/undo": ("", "take the last message and its answer back"),
    "/reset": ("", "begin anew"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "continue a saved one"),
    "/quit": ("", "leave, as Ctrl-D does"),
}
HELP = "\n".join(
    [f"{f'{name} {value}':<16}{what}" for name, (value, what) in COMMANDS.items()]
    + ["", "Ctrl-C stops an answer. A line that ends with \\ goes on in the next.", "//text sends /text."]
)


class Screen(Protocol):
    """Where a session shows what happens."""

    def note(self, text: str) -> None:
        """Say something about the conversation."""

    def problem(self, text: str) -> None:
        """Say what went wrong."""

    def answer(self) -> AbstractContextManager[Callable[[str], None]]:
        """A function to write an answer with, piece by piece."""
        ...


class Session:
    """A conversation driven by lines of text.

    Attributes:
        conversation: what is said.
        answers: all that were given.
    """

    def __init__(self, conversation: "Conversation", screen: Screen) -> None:
        self.conversation, self.answers = conversation, list["Answer"]()
        self._screen = screen

    def handle(self, line: str) -> bool:
        """Handle one line; False where it asks to leave."""
        text = line.strip()
        if not text:
            return True
        try:
            if fault := unicode_fault(text):
                raise ValueError(f"the message is {fault}")
            if text.startswith("/") and not text.startswith("//"):
                return self._command(*text.split(maxsplit=1))
            self._answer(lambda write: self.conversation.ask(text.removeprefix("/"), write))
        except OSError as error:
            self._screen.problem(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except ValueError as error:
            self._screen.problem(str(error))
        return True

    def _command(self, name: str, value: str = "") -> bool:
        conversation, note = self.conversation, self._screen.note
        if name not in COMMANDS:
            raise ValueError(f"{name} is not a command; /help shows them, //{name[1:]} sends it to the model")
        if COMMANDS[name][0] and not value and name != "/system":
            raise ValueError(f"{name} {COMMANDS[name][0]}: {COMMANDS[name][1]}")
        if name == "/quit":
            return False
        if name == "/help":
            note(HELP)
        elif name == "/system":
            if value:
                conversation.system = None if value == "-" else value
            note(f"system prompt: {conversation.system}" if conversation.system else "no system prompt")
        elif name == "/temp":
            conversation.temperature = _value(temperature, value)
            note(f"temperature {conversation.temperature:g}")
        elif name == "/tokens":
            conversation.max_new_tokens = _value(positive, value)
            note(f"answers of up to {conversation.max_new_tokens} tokens")
        elif name == "/retry":
            self._answer(conversation.retry)
        elif name == "/undo":
            note(f"taken back: {conversation.undo()}")
        elif name == "/reset":
            conversation.reset()
            note("a new conversation")
        elif name == "/save":
            self._save(Path(value).expanduser())
        elif name == "/load":
            self._load(Path(value).expanduser())
        return True

    def _answer(self, ask: Callable[[Callable[[str], None]], "Answer"]) -> None:
        with self._screen.answer() as write:
            answer = ask(write)
        self.answers.append(answer)
        if answer.dropped:
            turns = "turn is" if answer.dropped == 1 else f"{answer.dropped} turns are"
            self._screen.note(
                f"the oldest {turns} no longer visible: the model takes {self.conversation.context} tokens"
            )
        self._screen.note(summary(answer))

    def _save(self, path: Path) -> None:
        from dbrx_quant.runtime.files.atomic import write_json

        if not path.parent.is_dir():
            raise ValueError(f"{path.parent}: no such folder")
        write_json(path, {"messages": self.conversation.all_messages()})
        self._screen.note(f"saved to {path}")

    def _load(self, path: Path) -> None:
        from dbrx_quant.runtime.files.json_text import load_json

        try:
            content = load_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{path}: not a saved conversation; /save writes one")
        self.conversation.reset(messages)
        turns = len(self.conversation.messages) // 2
        self._screen.note(f"{turns} turn{'s' * (turns != 1)} from {path}")


def summary(answer: "Answer") -> str:
    """One line about an answer: how long it is, how fast it came, why it ended."""
    parts = [f"{answer.tokens} token{'s' * (answer.tokens != 1)}"]
    if answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    parts.append(f"first after {seconds_text(answer.first_seconds)}")
    parts.append(f"prompt {answer.prompt_tokens} ({answer.reused} cached)")
    if answer.stopped == "interrupted":
        parts.append("stopped")
    elif answer.stopped == "length":
        parts.append("cut off: /tokens N allows more")
    elif answer.stopped == "context":
        parts.append("cut off: the context is full")
    return ", ".join(parts)


def _value(read: Callable[[str], T], text: str) -> T:
    """What an argument's type makes of a text.

    Raises:
        ValueError: nothing.
    """
    try:
        return read(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
