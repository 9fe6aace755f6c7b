"""How workers come together: who they are, whether they compute alike, and which of them see the work folder.

torchrun tells each process its RANK and WORLD_SIZE. Where they are not set, or there is one worker, a process
is alone, and torch.distributed is not imported.
"""

import json
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.calibration.blocks.crew import Alone, Crew
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.quantize.measurement import source_facts
from dbrx_quant.quantize.work_folder import EXCHANGE, arithmetic
from dbrx_quant.quantize.workers.board import Board, WorkerError, open_store, patience
from dbrx_quant.quantize.workers.exchange import Exchange
from dbrx_quant.quantize.workers.helper import Helper
from dbrx_quant.quantize.workers.leader import Leader
from dbrx_quant.quantize.workers.peers import until_visible
from dbrx_quant.quantize.workers.ranks import rank, size
from dbrx_quant.runtime.files.atomic import write_text
from dbrx_quant.runtime.files.lock import locked
from dbrx_quant.runtime.kernels.device import device_name
from dbrx_quant.runtime.library import _native

_OWN = ".worker-"  # begins the name of the folder of a worker that does not see rank 0's


@contextmanager
def crew_of(work: Path, model: Path, device: torch.device, quiet: bool) -> Iterator[Crew]:
    """The crew of rank 0, or of a process that is alone.

    Args:
        work: the work folder, which this process holds the lock of.
        model: the source's folder.
        device: that this process computes on.
        quiet: whether nothing is told of how long workers have waited.

    Raises:
        WorkerError: a worker fails, stalls, or computes otherwise than this one.
    """
    if size() == 1:
        yield Alone()
        return
    board = Board(open_store(0, size()), 0, size())
    with _telling(board), _emptied(work / EXCHANGE):
        board.note("the start")
        _compare(board, _facts(model, device))
        leader = Leader(board, Exchange(board, work, _remote(board, work)))
        yield leader
        waited = leader.end()
        if not quiet:
            shown = ", ".join(f"{seconds:.0f}" for seconds in waited)
            print(f"{len(waited)} workers; seconds that each waited for others: {shown}", file=sys.stderr)


def help_out(work: Path, model: Path, device: torch.device) -> None:
    """Be a worker that rank 0 calls, until the work is done.

    Args:
        work: the work folder, seen or not.
        model: the source's folder.
        device: to compute on.

    Raises:
        WorkerError: another worker fails or stalls.
    """
    board = Board(open_store(rank(), size()), rank(), size())
    with _telling(board):
        board.note("the start")
        source = StreamedModel(model, device)
        board.put(f"member/{board.rank}", {"host": socket.gethostname(), "facts": _facts(model, device)})
        token = board.take("token", [0], "rank 0")
        sees = _is_seen(work / EXCHANGE / token)
        board.put(f"sees/{board.rank}", sees)
        remote = board.take("remote", [0], "rank 0")
        if remote:
            _connect(board)
        if sees:
            Helper(board, Exchange(board, work, remote), source).help_out()
            return
        root = work / f"{_OWN}{board.rank}"
        with locked(root), _emptied(root / "files") as inner, _emptied(inner / EXCHANGE):
            Helper(board, Exchange(board, inner, remote), source).help_out()


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is empty at first, and gone at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _telling(board: Board) -> Iterator[None]:
    """Tell the others of an error."""
    try:
        yield
    except BaseException as error:
        board.fail(error)
        raise


def _facts(model: Path, device: torch.device) -> dict[str, Any]:
    """What workers must have in common to end with the same bytes."""
    return {
        "model": source_facts(model),
        **arithmetic(device),
        "device (--device)": device_name(device),
        "torch": torch.__version__,
        "instruction set": f"{torch.backends.cpu.get_cpu_capability()}, {_native.isa()}",
    }


def _compare(board: Board, facts: dict[str, Any]) -> None:
    """Raise WorkerError unless all workers have joined and have these facts."""
    own = json.loads(json.dumps(facts))
    for other in board.others:
        member = board.take(f"member/{other}", [other], f"rank {other} to join")
        theirs = member["facts"]
        if theirs["model"] != own["model"]:
            raise WorkerError(f"rank {other} on {member['host']} has another model than rank 0")
        if different := [key for key in own if theirs[key] != own[key]]:
            said = "; ".join(f"{key} is {theirs[key]}, on rank 0 {own[key]}" for key in different)
            raise WorkerError(
                f"rank {other} on {member['host']} computes with something else than rank 0, and the result "
                f"would depend on who does what: {said}"
            )


def _remote(board: Board, work: Path) -> list[int]:
    """Which workers do not see the work folder; connected to those, if there are any."""
    token = f"{secrets.token_hex(8)}.txt"
    write_text(work / EXCHANGE / token, "")
    board.put("token", token)
    seen = {other: board.take(f"sees/{other}", [other], f"rank {other}") for other in board.others}
    remote = [other for other, sees in seen.items() if not sees]
    board.put("remote", remote)
    if remote:
        _connect(board)
    return remote


def _is_seen(path: Path) -> bool:
    """Whether this worker sees a file of rank 0; where folders are shared, it may take seconds to appear."""
    if not path.parent.is_dir():
        return False
    try:
        until_visible(path, 10.0)
    except WorkerError:
        return False
    return True


def _connect(board: Board) -> None:
    """Begin to send and receive through gloo: what is exchanged are bytes of files."""
    import torch.distributed as dist

    wait = timedelta(seconds=patience())
    store = dist.PrefixStore("gloo", board.store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=board.rank, world_size=board.size, timeout=wait)
