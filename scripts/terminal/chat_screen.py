"""The two screens of the chat: a terminal, where answers are shown as formatted text, and plain text."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dbrx_quant.scripts.terminal.door import visible
from dbrx_quant.scripts.terminal.output import say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

_REFRESH_SECONDS = 0.1
_PAUSE = 9  # times what a drawing takes: long answers, too, spend a tenth of the time on it


class PlainScreen:
    """Answers on stdout as they come, everything else on stderr.

    Args:
        answers: whether to print answers at all.
    """

    def __init__(self, answers: bool = True) -> None:
        self._answers = answers

    def note(self, text: str) -> None:
        """On stderr."""
        say(text)

    def problem(self, text: str) -> None:
        """On stderr."""
        say(f"dbrx-quant chat: {text}")

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Prints each piece at once."""
        yield self._write
        self._write("\n")

    def _write(self, piece: str) -> None:
        if self._answers:
            sys.stdout.write(piece)
            sys.stdout.flush()


class TerminalScreen:
    """A terminal, with answers as Markdown or as they are.

    Args:
        console: the terminal.
        markdown: whether to format answers.
    """

    def __init__(self, console: "Console", markdown: bool) -> None:
        self._console, self._markdown = console, markdown

    def note(self, text: str) -> None:
        """In a faint colour."""
        from rich.text import Text

        self._console.print(Text(visible(text), style="dim"), soft_wrap=True)

    def problem(self, text: str) -> None:
        """In red."""
        from rich.text import Text

        self._console.print(Text(visible(text), style="red"), soft_wrap=True)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Shows the text so far again and again, or prints each piece; keys are not shown meanwhile."""
        with _no_echo():
            if self._markdown:
                with _Formatted(self._console) as formatted:
                    yield lambda piece: formatted.write(visible(piece))
            else:
                yield lambda piece: self._console.out(visible(piece), end="", highlight=False)
                self._console.print()


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keep the terminal from showing typed keys, Ctrl-C's ^C too, which would move what is drawn."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Formatted:
    """A growing text shown as Markdown.

    What may still change is redrawn in place, at most a screen; lines above that are final, since what has
    scrolled out of a terminal cannot be redrawn.
    """

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._text, self._final, self._next = "", 0, 0.0

    def __enter__(self) -> "_Formatted":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        lines = self._lines()
        self._live.stop()  # takes away what it has drawn
        self._print(lines[self._final :])

    def write(self, piece: str) -> None:
        """Add to the text."""
        self._text += piece
        started = time.monotonic()
        if started < self._next:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # or what is half drawn would stay
        try:
            self._draw()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        ended = time.monotonic()
        self._next = ended + max(_REFRESH_SECONDS, _PAUSE * (ended - started))

    def _draw(self) -> None:
        lines = self._lines()
        final = max(self._final, len(lines) - max(1, self._console.height - 2))
        self._print(lines[self._final : final])
        self._final = final
        self._live.update(_Lines(lines[final:]), refresh=True)

    def _lines(self) -> "list[list[Segment]]":
        from rich.markdown import Markdown

        lines = self._console.render_lines(Markdown(self._text, code_theme="ansi_dark"), pad=False)
        for line in lines:  # which Markdown fills up with blanks
            while line and not line[-1].text.strip() and not (line[-1].style and line[-1].style.bgcolor):
                line.pop()
        return lines

    def _print(self, lines: "list[list[Segment]]") -> None:
        if lines:
            self._console.print(_Lines(lines), end="")


class _Lines:
    """Lines of segments, as rich prints them."""

    def __init__(self, lines: "list[list[Segment]]") -> None:
        self._lines = lines

    def __rich_console__(self, console: "Console", options: object) -> "Iterator[Segment]":
        from rich.segment import Segment

        for line in self._lines:
            yield from line
            yield Segment.line()
