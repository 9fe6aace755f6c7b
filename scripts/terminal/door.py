"""The command's door: what goes out holds no secret, drives no terminal, and is never a bare traceback."""

import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from dbrx_quant.runtime.output.redact import redact, redact_message

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
# Colours, erasing, a line up, back to its start: what progress bars and loggers draw with.
_DRAWING = re.compile(r"(\r|\x1b\[(?:[\d;]*[mKJ]|\d*A))|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_PACKAGE = "/dbrx_quant/"


def visible(text: str) -> str:
    """The text with control characters, line feeds and tabs aside, written out."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def _drawn(text: str) -> str:
    """The text with all control sequences visible but those of progress bars and colours."""
    return _DRAWING.sub(lambda found: found[1] or _escape(found[0]), text)


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}"


class Filtered:
    """A text stream that cleans what is written to it, and can write what its encoding has no bytes for.

    Args:
        stream: where it goes.
        clean: what is done to each text.
        drawn: the stream for a library that draws, such as rich.
    """

    def __init__(self, stream: TextIO, clean: Callable[[str], str], drawn: "Filtered | None" = None) -> None:
        self._stream, self._clean = stream, clean
        self.drawn = drawn or self

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        cleaned = self._clean(text)
        with self._dropped_when_broken():
            try:
                self._stream.write(cleaned)
            except UnicodeEncodeError:  # half a character pair, or bytes of a file name that are no text
                encoding = self._stream.encoding
                self._stream.write(cleaned.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is buffered."""
        with self._dropped_when_broken():
            self._stream.flush()

    @contextmanager
    def _dropped_when_broken(self) -> Iterator[None]:
        """Drop what nobody takes any more, or it would fail once again at the exit."""
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise type(error)(error.errno, error.strerror, self._stream.name) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Within it, nothing gets out on stdout or stderr but through the filters.

    Known secrets are taken out of both, and out of messages whatever looks like one. A terminal shows control
    characters as text; a pipe or file gets them as they are. A stream that is closed swallows what it gets.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: whoever takes a text checks it
    stdin, stdout, stderr = (stream or _closed(mode) for stream, mode in zip(before, "rww", strict=True))
    results = Filtered(stdout, redact)
    sys.stdin = stdin
    sys.stdout = cast(
        TextIO,
        Filtered(stdout, lambda text: visible(redact(text)), results) if stdout.isatty() else results,
    )
    sys.stderr = cast(
        TextIO,
        Filtered(stderr, (lambda text: _drawn(redact_message(text))) if stderr.isatty() else redact_message),
    )
    make = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *given, **more: _cleaned(make(*given, **more)))
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        sys.stdin, sys.stdout, sys.stderr = before


def _cleaned(record: logging.LogRecord) -> logging.LogRecord:
    """A record without secrets: a library's handler may have been made before the streams were guarded."""
    record.msg = redact_message(record.msg) if isinstance(record.msg, str) else record.msg
    if isinstance(record.args, tuple):
        record.args = tuple(redact_message(arg) if isinstance(arg, str) else arg for arg in record.args)
    return record


def _closed(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))


def fault_line(error: BaseException, arguments: Sequence[str]) -> str:
    """One line about an error that nobody thought of; its traceback goes into a file that the line names."""
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in frame.filename]
    where = f" ({ours[-1].filename.rpartition(_PACKAGE)[2]}:{ours[-1].lineno})" if ours else ""
    kept = _keep(error, arguments)
    place = f"in {kept}, or shown with --debug" if kept else "that --debug shows"
    return f"{said[:300]}{where}; this is a fault of the program: please report it with the traceback {place}"


def _keep(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Write a traceback into a file of its own; None where that cannot be."""
    text = f"dbrx-quant {' '.join(arguments)}\nPython {sys.version}\n\n"
    text += "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(".txt", "dbrx-quant-")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redact_message(text))
        return name
    except OSError:
        return None
