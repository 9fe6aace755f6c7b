"""What workers tell each other in a few words: keys of a torch.distributed store, waited for with patience.

Waiting is polling, so that a signal ends it, and so that whoever waits sees who fails or stalls meanwhile. A
worker notes what it does whenever it begins something; one whose note stays the same for too long is named.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")

PATIENCE = "DBRXQ_WORKER_PATIENCE"  # seconds without a word from another worker before it is given up
_DEFAULT_PATIENCE = 2 * 3600.0  # an expert of DBRX takes minutes, its head or a slow disk an hour
_SHORTEST, _LONGEST = 0.01, 0.5  # seconds between two looks
_EVERY = 2.0  # seconds between two looks at what others do
_FAILED = "failed"


class WorkerError(RuntimeError):
    """Another worker has failed, or has not been heard of."""


def patience() -> float:
    """Seconds to wait for a worker that gives no sign.

    Raises:
        ValueError: the environment asks for something else than a positive number.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text) if text else _DEFAULT_PATIENCE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{PATIENCE}={text}: expected a number of seconds above 0")
    return seconds


class Board:
    """The store as one worker sees it.

    Args:
        store: of torch.distributed.
        rank: the worker's number; 0 drives the conversion.
        size: how many workers there are.

    Attributes:
        waited: seconds spent waiting for others.
    """

    def __init__(self, store: "Store", rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.waited = store, rank, size, 0.0
        self._patience, self._doing = patience(), "the start"

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def note(self, what: str) -> None:
        """Note what this worker begins to do."""
        self._doing, since = what, time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.put(f"doing/{self.rank}", {"host": socket.gethostname(), "what": what, "since": since})

    def fail(self, error: BaseException) -> None:
        """Tell the others that this worker ends; the first to fail is remembered."""
        what = f"{error}" or type(error).__name__ if isinstance(error, Exception) else "stopped by a signal"
        text = json.dumps([self.rank, socket.gethostname(), what])
        with suppress(RuntimeError):  # the store is gone, and with it who could be told
            self.store.compare_set(_FAILED, "", text)

    def put(self, key: str, value: Any) -> None:
        """Put a JSON-ready value."""
        _reached(lambda: self.store.set(key, json.dumps(value)))

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        return bool(_reached(lambda: self.store.check([key])))

    def take(self, key: str, ranks: Sequence[int], what: str) -> Any:
        """The value of a key, waited for.

        Args:
            key: the key.
            ranks: who may put it.
            what: is waited for.

        Raises:
            WorkerError: a worker has failed, or none of those has begun anything new for too long.
        """
        if not self.has(key):
            self._wait(key, ranks, what)
        return json.loads(_reached(lambda: self.store.get(key)))

    def _wait(self, key: str, ranks: Sequence[int], what: str) -> None:
        before = self._doing
        self.note(f"waiting for {what}")
        began = heard = looked = time.monotonic()
        pause, notes = _SHORTEST, self._notes(ranks)
        while not self.has(key):
            time.sleep(pause)
            pause, now = min(_LONGEST, 1.2 * pause), time.monotonic()
            if now - looked < min(_EVERY, self._patience / 2):
                continue
            looked = now
            self.check()
            if (latest := self._notes(ranks)) != notes:
                heard, notes = now, latest
            elif now - heard > self._patience:
                raise WorkerError(
                    f"{self._silent(notes)}; waited for {what}, {now - heard:.0f} s without a sign"
                )
        self.waited += time.monotonic() - began
        self.note(before)

    def check(self) -> None:
        """Raise WorkerError if a worker has failed."""
        if self.has(_FAILED):
            rank, host, text = json.loads(_reached(lambda: self.store.get(_FAILED)))
            raise WorkerError(f"rank {rank} on {host} has failed: {text}")

    def _notes(self, ranks: Sequence[int]) -> dict[int, Any]:
        return {rank: self._note_of(rank) for rank in ranks}

    def _note_of(self, rank: int) -> Any:
        key = f"doing/{rank}"
        return json.loads(_reached(lambda: self.store.get(key))) if self.has(key) else None

    def _silent(self, notes: dict[int, Any]) -> str:
        """Who has not been heard of, and what they did last."""
        texts = []
        for rank, note in notes.items():
            last = "has not joined" if note is None else ""
            if note is not None:
                last = f"on {note['host']} gives no sign: {note['what']} since {note['since']}"
            texts.append(f"rank {rank} {last}")
        return "; ".join(texts)


def _reached(call: Callable[[], T]) -> T:
    """The result of a call to the store.

    Raises:
        WorkerError: there is no store any more.
    """
    try:
        return call()
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise WorkerError(
            f"the workers' store does not answer ({line}); rank 0 or its torchrun has ended"
        ) from error


def open_store(rank: int, size: int) -> "Store":
    """The store that MASTER_ADDR and MASTER_PORT name: torchrun's, or else rank 0's own.

    Raises:
        ValueError: they are not set.
        WorkerError: nobody answers there.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ValueError(
            "WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT; start workers with torchrun"
        )
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = timedelta(seconds=min(patience(), 3600.0))
    store = _reached(lambda: TCPStore(host, int(port), size, own, wait, wait_for_workers=False))
    return PrefixStore(f"dbrx-quant/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
