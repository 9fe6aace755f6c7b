"""The server's door: who is let in with what, how many wait, and that work ends when its client has left.

Everything here is decided before the web application sees a request; it needs nothing but ASGI.
"""

import asyncio
import ipaddress
import math
import re
import secrets
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OPEN_PATHS = ("/health",)  # for whoever watches over the server

_DRAIN_SECONDS = 5  # a client that is still sending hears an answer only if what it sends is read
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Places:
    """The places of a bounded queue, the one at the model included.

    Args:
        most: places.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._seconds, self._last = 1.0, 0.0

    def take(self) -> bool:
        """Take a place, to be given back with `leave`, unless all are taken."""
        if self.taken >= self.most:
            return False
        self.taken += 1
        return True

    def leave(self, since: float) -> None:
        """Give back a place that was taken at a time."""
        now = time.monotonic()
        self.taken -= 1
        self._seconds += 0.2 * (
            now - max(since, self._last) - self._seconds
        )  # at the model, not in the queue
        self._last = now

    def wait(self) -> int:
        """Seconds until a place will be free, as far as the last requests tell."""
        return max(1, math.ceil(self._seconds))


class Visit:
    """A request in its place of the queue.

    Args:
        places: where it has taken one, if so.
        number: what it is called.

    Attributes:
        id: its number.
        gone: set when it is over, answered or not.
    """

    def __init__(self, places: Places | None, number: str) -> None:
        self.id, self.gone = number, threading.Event()
        self._places, self._since = places, time.monotonic()

    def leave(self) -> None:
        """Give the place back, when the model is done with it; the answer may still be on its way."""
        places, self._places = self._places, None
        if places is not None:
            places.leave(self._since)


class Door:
    """An ASGI application in front of another.

    Requests to `POSTS` reach it with their whole body and a place of the queue, `visit` in their state.

    Args:
        app: the application.
        places: of the queue.
        most_bytes: of a body.
        api_key: what clients must send as their bearer token, if anything.
        hosts: further names that the server is called by; `*` allows all.
    """

    def __init__(
        self,
        app: Any,
        places: Places,
        most_bytes: int,
        api_key: str | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        self.app, self._places, self._most = app, places, most_bytes
        self._key = None if api_key is None else api_key.encode()
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else str(uuid.uuid4())

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        refusal = self._refuse(scope, headers)
        if refusal is not None:
            await _turn_away(refusal, headers, scope, receive, marked)
        elif scope["method"] == "POST" and scope["path"] in POSTS:
            await self._admit(number, headers, scope, receive, marked)
        else:
            await self.app(scope, receive, marked)

    def _refuse(self, scope: Any, headers: Headers) -> JSONResponse | None:
        """The answer to a request that is not to be read."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return error_response(
                403, f"this server is not known as {host[:80]!r}; --allow-host lets it be called that"
            )
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, token = (dict(scope["headers"]).get(b"authorization", b"")).partition(b" ")
            if kind.lower() != b"bearer" or not secrets.compare_digest(token.strip(), self._key):
                return error_response(401, "missing or wrong API key")
        if scope["method"] != "POST" or scope["path"] not in POSTS:
            return None
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            return error_response(415, "the body must be declared as Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._most:
            return self._too_large()
        return None

    def _is_ours(self, header: str) -> bool:
        """Whether a Host header is an address or a name that no stranger can have pointed here.

        A web page may call its own name, and have that lead here (DNS rebinding): not a number, nor a name
        without a dot, which nobody can register.
        """
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if "." not in name or "*" in self._hosts or name in self._hosts:
            return True
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name.endswith(".localhost")

    def _too_large(self) -> JSONResponse:
        return error_response(
            413, f"the body is larger than {self._most} bytes, more than the context can hold"
        )

    async def _admit(self, number: str, headers: Headers, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._most:
                await _turn_away(self._too_large(), headers, scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        if not self._places.take():
            full = error_response(503, f"{self._places.most} requests are waiting, no more may")
            full.headers["Retry-After"] = str(self._places.wait())
            await full(scope, receive, send)
            return
        visit = Visit(self._places, number)
        scope.setdefault("state", {})["visit"] = visit
        try:
            await _while_wanted(self.app, bytes(body), scope, receive, send)
        finally:
            visit.gone.set()
            visit.leave()


async def _while_wanted(app: Any, body: bytes, scope: Any, receive: Any, send: Any) -> None:
    """Run an application on a body for as long as its client is there."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()  # for ever: that the client leaves is seen below

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(app(scope, read, send)), asyncio.ensure_future(left())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _turn_away(response: JSONResponse, headers: Headers, scope: Any, receive: Any, send: Any) -> None:
    """Answer a request whose body is not read, and close its connection."""
    response.headers["Connection"] = "close"
    coming = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if not coming or "expect" in headers:
        await response(scope, receive, send)
        return
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Any) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
        pass


def error_response(status: int, message: str) -> JSONResponse:
    """An error in the form that OpenAI's clients expect."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
