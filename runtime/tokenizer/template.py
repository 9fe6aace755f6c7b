"""Chat templates, rendered in a process of their own with limits: each is a program that a stranger wrote.

Jinja's sandbox keeps it from the machine, not from endless loops or gigabytes of text. The process starts
with the first template (about a second), renders all that follow, and ends with ours.
"""

import atexit
import functools
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dbrx_quant.runtime.files.errors import CheckpointError

SECONDS = 5  # of processor time for one text
MEGABYTES = 256
LONGEST = 16_000_000  # characters of a text
_WAIT_SECONDS = 60  # on a busy machine, and for the start

_START = "import sys; sys.path[:] = sys.argv[1:]; from {} import serve; serve()"


class TemplateError(ValueError):
    """A chat template cannot be rendered, or not within the limits."""


def render(
    template: str, messages: Sequence[Any], *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The text of a conversation under a template, as transformers renders it.

    Args:
        template: Jinja source.
        messages: of the conversation; plain JSON values.
        add_generation_prompt: whether to end with what opens an answer.
        **variables: what else the template sees, such as `bos_token`.

    Raises:
        TemplateError: it fails, takes more than SECONDS or MEGABYTES, or makes more than LONGEST characters.
    """
    arguments = {
        "conversations": [list(messages)],
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        **variables,
    }
    answer = _answer(json.dumps({"seconds": SECONDS, "arguments": arguments}))
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def chat_ids(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """The ids of a conversation, the answer opened, as transformers' `apply_chat_template` gives them.

    Raises:
        CheckpointError: the tokenizer's template cannot be rendered.
    """
    template, tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    try:
        text = render(template, messages, **{**tokens, "add_generation_prompt": True})
    except TemplateError as error:
        where = tokenizer.name_or_path
        raise CheckpointError(f"{where}: the chat template cannot be rendered: {error}") from None
    return [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]


@functools.lru_cache(maxsize=64)
def _answer(request: str) -> dict[str, str]:
    return _WORKER.ask(request)


class _Worker:
    """The process, started when it is first asked and again when it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: str) -> dict[str, str]:
        """Its answer to one request: `text`, or `error`."""
        with self._lock:
            process = self._process
            if process is None or self._owner != os.getpid():  # a fork of ours has a process of its own
                process = self._start()
            try:
                line = _exchange(process, request.encode() + b"\n")
            except BaseException:
                self.stop()
                raise
            if line is None:
                self.stop()
                return {"error": f"it takes more than {SECONDS} seconds or {MEGABYTES} MB"}
            answer: dict[str, str] = json.loads(line)
            return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(__name__), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        if self._owner == 0:
            atexit.register(self.stop)
        self._process, self._owner = process, os.getpid()
        return process

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


_WORKER = _Worker()


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes | None:
    """The line that the process answers; None where it ends or does not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except OSError:
        return None
    parts: list[bytes] = []
    end = time.monotonic() + _WAIT_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            part = os.read(process.stdout.fileno(), 1 << 20)
            parts.append(part)
            if not part:
                return None
            if part.endswith(b"\n"):
                return b"".join(parts)
    return None


def serve() -> None:
    """What the process does: answers requests, a line each, until there are no more."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_time(request["seconds"])
        try:
            rendered, _ = render_jinja_template(**request["arguments"])
            text = str(rendered[0])
            too_long = f"it makes {len(text)} characters, at most {LONGEST} are taken"
            answer = {"text": text} if len(text) <= LONGEST else {"error": too_long}
        except MemoryError:
            answer = {"error": f"it takes more than {MEGABYTES} MB"}
        except Exception as error:  # a template can fail in any way
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Allow some memory beyond what is in use, where the system can limit it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_time(seconds: int) -> None:
    """Allow some seconds beyond those used; the system then kills the process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
