"""Files that go from one worker to another: seen in a folder that both have, or sent by torch.distributed.

Rank 0 works in the conversion's work folder. A worker that sees this folder reads and writes there; one that
does not has a folder of its own, and every file it needs or makes is sent, with its checksum.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.quantize.work_folder import EXCHANGE
from dbrx_quant.quantize.workers.board import Board, WorkerError
from dbrx_quant.runtime.files.atomic import write_parts
from dbrx_quant.runtime.files.sealed import seal, sha256

_CHUNK = 64 << 20  # bytes that are sent at once


class Exchange:
    """The files of one worker.

    Args:
        board: of all workers.
        root: the work folder as this worker has it.
        remote: the ranks that do not see rank 0's.

    Attributes:
        folder: for what is of one run, inside of `root`.
    """

    def __init__(self, board: Board, root: Path, remote: Iterable[int]) -> None:
        self.board, self.root, self.remote = board, root, frozenset(remote)
        self.folder = root / EXCHANGE
        self._sent: list[tuple[Any, Tensor]] = []

    def relative(self, path: Path) -> str:
        """A path in the work folder, as it is named to others."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, name: str) -> Path:
        """The path of a name that another worker has given.

        Raises:
            WorkerError: it leads out of the work folder.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise WorkerError(f"{name}: no path in the work folder")
        return self.root / pure

    def offer(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """What is told of sealed files before they are sent."""
        if not self.remote:
            return [{"name": self.relative(path)} for path in paths]
        return [
            {"name": self.relative(path), "size": path.stat().st_size, "sha256": sha256(path)}
            for path in paths
        ]

    def send(self, offered: Sequence[dict[str, Any]], rank: int, wait: bool = True) -> None:
        """Send files to a worker.

        Args:
            offered: what was told of them.
            rank: of the worker.
            wait: until they have been taken; else `finish_sending` does.
        """
        import torch.distributed as dist

        for file in offered:
            for chunk in _chunks(self.absolute(file["name"])):
                if wait:
                    dist.send(chunk, rank)
                else:
                    self._sent.append((dist.isend(chunk, rank), chunk))

    def finish_sending(self) -> None:
        """Wait until everything that was sent has been taken."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def receive(self, offered: Sequence[dict[str, Any]], rank: int) -> None:
        """Take files that a worker sends.

        Raises:
            WorkerError: what comes is not what was told of.
            OSError: the disk is full.
        """
        for file in offered:
            path, size = self.absolute(file["name"]), int(file["size"])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parts(path, _received(size, rank), size)
            seal(path)
            if sha256(path) != file["sha256"]:
                raise WorkerError(
                    f"{path}: does not arrive as rank {rank} has it; run the same command again"
                )

    def clear(self, keep: Path) -> None:
        """Remove all files from a folder that nobody else sees, but a sealed one."""
        for path in self.root.rglob("*"):
            if path.is_file() and keep.name not in path.name:
                path.unlink()


def _chunks(path: Path) -> Iterator[Tensor]:
    with path.open("rb") as file:
        while part := bytearray(file.read(_CHUNK)):
            yield torch.frombuffer(part, dtype=torch.uint8)


def _received(size: int, rank: int) -> Iterator[memoryview]:
    import torch.distributed as dist

    for begin in range(0, size, _CHUNK):
        chunk = torch.empty(min(_CHUNK, size - begin), dtype=torch.uint8)
        dist.recv(chunk, rank)
        yield chunk.numpy().data
