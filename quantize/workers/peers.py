"""What any worker does while a task runs: it waits for a file of another one, and tells of its own."""

import time
from pathlib import Path

from dbrx_quant.quantize.workers.board import Board, WorkerError
from dbrx_quant.quantize.workers.exchange import Exchange
from dbrx_quant.runtime.files.atomic import write_text
from dbrx_quant.runtime.files.sealed import seal

_VISIBLE = 60.0  # seconds until a file that is told of must be seen, as NFS keeps what it knows of a folder


class Peers:
    """A worker among others.

    Args:
        board: of all workers.
        exchange: of its files.
    """

    def __init__(self, board: Board, exchange: Exchange) -> None:
        self.board, self.exchange = board, exchange
        self._known: set[str] = set()

    def wait_for(self, path: Path) -> None:
        """Return when a small file is there that the task of an earlier expert makes."""
        name = self.exchange.relative(path)
        if name in self._known:
            return
        text = self.board.take(f"file/{name}", self.board.others, name)
        if text is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            seal(path)
        until_visible(path)
        self._known.add(name)

    def announce(self, path: Path) -> None:
        """Say that a small file is there; those who do not see it are given its text."""
        name = self.exchange.relative(path)
        self._known.add(name)
        self.board.put(f"file/{name}", path.read_text(encoding="utf-8") if self.exchange.remote else None)


def until_visible(path: Path, patience: float = _VISIBLE) -> None:
    """Wait for a file that another worker has written into a shared folder, some seconds at most.

    Raises:
        WorkerError: it does not come.
    """
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            raise WorkerError(f"{path}: written by another worker, and not seen here after {patience:.0f} s")
        time.sleep(0.05)
