"""Requests to an ASGI application in this process: no sockets, no threads of a server."""

import asyncio
import json
from dataclasses import dataclass

JSON = {"content-type": "application/json", "host": "localhost"}


@dataclass(frozen=True)
class Got:
    """An answer: its status, headers and body."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def message(self):
        return self.json["error"]["message"]


async def call(app, path, body=b"", headers=(), *, method="POST", pieces=None, leave=None):
    """One request; a body that is not bytes goes as JSON, `pieces` without a length.

    Args:
        app: the application.
        path: of the request.
        body: of the request.
        headers: beside those that make it JSON from this machine; None takes one out.
        method: of the request.
        pieces: in place of the body.
        leave: an Event; when it is set, the client is gone.

    Returns:
        what it `Got`; None if it left without.
    """
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    coming = list(pieces if pieces is not None else [raw])
    given = {**JSON, **({} if pieces is not None else {"content-length": str(len(raw))}), **dict(headers)}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    status, headers_back, sent = None, {}, b""

    async def receive():
        if coming:
            piece = coming.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(coming)}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal status, headers_back, sent
        if message["type"] == "http.response.start":
            status = message["status"]
            headers_back = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            sent += message.get("body", b"")

    try:
        await app(scope, receive, send)
    except Exception:
        if status is None:
            raise
    return None if status is None else Got(status, headers_back, sent)


def ask(app, *arguments, **options):
    """`call`, from where no loop runs."""
    return asyncio.run(call(app, *arguments, **options))
