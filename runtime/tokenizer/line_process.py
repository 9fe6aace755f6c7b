"""A process of its own for programs of strangers: it answers a line with a line, in bounded time and memory.

A chat template is a program that came with the model, and so, in effect, is the pattern by which a tokenizer
splits text. Jinja's sandbox keeps the one from the machine, not from endless loops or gigabytes of text; and
neither can be interrupted in a thread.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

_PROGRAM = Path(__file__).with_name("text_program.py")
_START_SECONDS = 120  # on a busy machine


class LineProcess:
    """`text_program.py` in a child process, started when it is needed, and again when it was killed.

    Threads wait for each other. A fork of this process gets a child of its own. No child outlives its parent:
    it is ended at exit; where its parent is killed, it ends as soon as it wants to read the next request, or
    has had the processor time of the last.

    Args:
        first: makes the first line that a child is told: a tokenizer's JSON, or null.
        megabytes: that a request may take.
    """

    def __init__(self, first: Callable[[], str], megabytes: int) -> None:
        self._first, self._megabytes = first, megabytes
        self._locks: dict[int, Lock] = {}
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._ready = False

    def start(self) -> None:
        """Start it ahead of the first exchange, unless it runs."""
        with self._lock():
            if not self._closed:
                self._start()

    def exchange(self, line: str, seconds: float) -> dict[str, Any] | None:
        """What the child answers to a request.

        Args:
            line: the request, as `text_program.py` takes it.
            seconds: that it may take by the clock; the start of a child is not counted.

        Returns:
            the answer; None where there is none in time, or the child ended, or this is closed.
        """
        with self._lock():
            if self._closed:
                return None
            answer = None
            try:
                child = self._start()
                if not self._ready:
                    self._ready = _exchange(child, self._first(), _START_SECONDS) is not None
                if self._ready:
                    answer = _exchange(child, line, seconds)
            finally:
                if answer is None:
                    self._end()  # what it might still say would be taken for the answer to the next
            return None if answer is None else json.loads(answer)

    def close(self) -> None:
        """End it for good, also amid an exchange."""
        self._closed = True
        atexit.unregister(self.close)
        if child := self._own_child():
            child.kill()  # whoever waits for its answer lets go of the lock
        with self._lock():
            self._end()

    def _lock(self) -> Lock:
        """That of this process: one that was held during a fork stays held in the fork."""
        return self._locks.setdefault(os.getpid(), Lock())

    def _own_child(self) -> subprocess.Popen[bytes] | None:
        return self._child if self._owner == os.getpid() else None

    def _start(self) -> subprocess.Popen[bytes]:
        """A child that runs; its modules are found where ours were, but never in the working directory."""
        child = self._own_child()
        if child and child.poll() is None:
            return child
        self._end()
        paths = [path for path in sys.path if path]
        child = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(self._megabytes), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
            bufsize=0,  # a fork would write what is left in a buffer once more
        )
        assert child.stdin is not None
        os.set_blocking(child.stdin.fileno(), False)
        self._child, self._owner, self._ready = child, os.getpid(), False
        atexit.unregister(self.close)
        atexit.register(self.close)
        if self._closed:  # meanwhile, by another thread, which may not have seen this child
            child.kill()
        return child

    def _end(self) -> None:
        if child := self._own_child():
            with child:  # closes the pipes and waits for it
                child.kill()


def _exchange(child: subprocess.Popen[bytes], line: str, seconds: float) -> bytes | None:
    """The line that a child answers; None where it ends or does not answer in time.

    Nothing here waits for longer: neither for a child that does not read, nor for one that never ends its
    line, nor for one that is gone while a fork holds its pipes open.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    unsent = memoryview(line.encode() + b"\n")
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdin, selectors.EVENT_WRITE)
        selector.register(child.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is child.stdin:
                    try:
                        unsent = unsent[os.write(key.fd, unsent) :]
                    except OSError:
                        return None
                    if not unsent:
                        selector.unregister(child.stdin)
                else:
                    part = os.read(key.fd, 1 << 20)
                    parts.append(part)
                    if not part:
                        return None
                    if part.endswith(b"\n"):
                        return b"".join(parts)
    return None
