"""Chat templates rendered, and texts encoded, in a process of their own that can be stopped.

A chat template is a program that came with the model, and so, in effect, is the pattern by which a tokenizer
splits text: neither can be interrupted in a thread. Here they run in a child with a limit of time and memory;
one that exceeds it is killed, and the next request starts another.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock, Timer
from typing import Any

SECONDS = 10
MEGABYTES = 1024

_START_SECONDS = 120


class TemplateError(ValueError):
    """A template, or a tokenizer, fails on what it is given, or wants too much time or memory."""


class TextProcess:
    """The process that renders and encodes for one tokenizer; started at once, ready a second or two later.

    Requests wait for each other. Close it, or use it as a context manager.

    Args:
        tokenizer: a fast tokenizer of transformers.
        seconds: of one request.
        megabytes: that a request may take.
    """

    def __init__(self, tokenizer: Any, *, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> None:
        self._tokenizer, self._seconds, self._megabytes = tokenizer, seconds, megabytes
        self._lock = Lock()
        self._closed = False
        self._child = self._start()
        self._ready = False

    def __enter__(self) -> "TextProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, also amid a request."""
        self._closed = True
        _end(self._child)

    def encode(self, text: str, most: int) -> tuple[list[int] | None, int]:
        """The ids of a text, as the tokenizer gives, or None if there are more than `most`; and their number.

        Raises:
            TemplateError: see there.
        """
        answer = self._ask({"text": text, "most": most})
        return answer["ids"], answer["count"]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        most: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int] | None, int]:
        """The ids of a conversation with the opening of the answer, or None if there are more than `most`.

        Args:
            messages: with role and content.
            most: ids that are of use.
            tools: for templates that tell the model about tools.
            variables: further ones of the template.

        Returns:
            the ids and their number.

        Raises:
            TemplateError: see there.
        """
        answer = self._ask(self._chat(messages, tools, variables) | {"most": most})
        return answer["ids"], answer["count"]

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation with the opening of the answer.

        Raises:
            TemplateError: see there.
        """
        text: str = self._ask(self._chat(messages, None, variables) | {"most": None})["text"]
        return text

    def _chat(self, messages: Any, tools: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "messages": list(messages),
            "template": self._tokenizer.get_chat_template(tools=tools),
            "variables": {
                **self._tokenizer.special_tokens_map,
                **variables,
                "tools": tools,
                "add_generation_prompt": True,
            },
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request | {"seconds": self._seconds + 5})
        with self._lock:
            if self._child.poll() is not None and not self._closed:
                self._child, self._ready = self._start(), False
            if not self._ready:
                self._exchange(self._tokenizer._tokenizer.to_str(), _START_SECONDS)
                self._ready = True
            answer = self._exchange(line, self._seconds)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer

    def _exchange(self, line: str, seconds: int) -> dict[str, Any]:
        """Send a line and read the answer."""
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        timer = Timer(seconds, child.kill)
        timer.start()
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            told = child.stdout.readline()
        except OSError:
            told = ""
        finally:
            timer.cancel()
        if not told.endswith("\n"):
            _end(child)
            raise TemplateError(f"took longer than {seconds} s, or ended the process that it ran in")
        answer: dict[str, Any] = json.loads(told)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        """A new child; its modules are found where ours were, but never in the working directory."""
        program = str(Path(__file__).with_name("text_process_main.py"))
        paths = [path for path in sys.path if path]
        code = f"import runpy, sys; sys.path[:] = {paths!r}; runpy.run_path({program!r}, run_name='__main__')"
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", code, str(self._megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; the child ends when its stdin does
            text=True,
            encoding="utf-8",
        )
        return child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
