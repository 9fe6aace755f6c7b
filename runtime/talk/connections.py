"""Connections of the server that do not wait for ever, and do not lock each other out.

A request must come whole within some seconds, and an answer be taken within some; where there are too many
connections, the oldest that has not said what it wants makes room. Wants `uvicorn`, with its h11 protocol.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10
BODY_SECONDS = 30
STALL_SECONDS = 30
MOST = 512

_SECONDS = {h11.IDLE: HEADER_SECONDS, h11.SEND_BODY: BODY_SECONDS}  # by what is still to come


def most_connections() -> int:
    """How many there may be: files, models and the rest need descriptors, too."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if allowed == resource.RLIM_INFINITY else min(MOST, allowed // 2)


class Connection(H11Protocol):  # type: ignore[misc]
    """One connection."""

    _awaited: Any = None  # what the client has still to send, as a state of h11
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Make room if there is none."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that each write that is not taken is noticed
        self._since = self.loop.time()
        self._watch()
        if len(self.connections) > most_connections():
            ours: Any = self.connections  # all are of this class
            waiting = [one for one in ours if one._awaited in _SECONDS or one.flow.write_paused]
            min(waiting or [self], key=lambda one: one._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        for timer in (self._late, self._stalled):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something was sent: is it all?"""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request may come."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def _watch(self) -> None:
        awaited = self.conn.their_state
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._late:
            self._late.cancel()
        seconds = _SECONDS.get(awaited)
        self._late = self.loop.call_later(seconds, self._give_up, seconds) if seconds else None

    def _give_up(self, seconds: float) -> None:
        """Close it, unless the last answer is still on its way: then that has its own time."""
        if self.transport.get_write_buffer_size():
            self._late = self.loop.call_later(seconds, self._give_up, seconds)
        else:
            self.transport.abort()
