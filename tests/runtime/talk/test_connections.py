"""Connections that say nothing, say it too slowly or do not listen, against a real server on loopback."""

import asyncio

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the server: pip install 'dbrx-quant[serve]'")

connections = pytest.importorskip("dbrx_quant.runtime.talk.connections")

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"x" * 2**26


async def app(scope, receive, send):
    if scope["method"] == "POST":
        while (await receive()).get("more_body"):
            pass
    body = LARGE if scope["path"] == "/large" else b"ok"
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


def serve(talk):
    """What `talk` returns, a function of a way to connect."""

    async def both():
        config = uvicorn.Config(
            app, port=0, http=connections.Connection, ws="none", lifespan="off", log_level="critical"
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        number = server.servers[0].sockets[0].getsockname()[1]
        try:
            return await asyncio.wait_for(talk(lambda: asyncio.open_connection("127.0.0.1", number)), 60)
        finally:
            server.should_exit = True
            await running

    return asyncio.run(both())


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(connections, "_SECONDS", dict.fromkeys(connections._SECONDS, 0.3))
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.3)


async def rest(reader):
    """What comes until the connection ends, in whichever way."""
    got = b""
    try:
        while piece := await reader.read(2**20):
            got += piece
    except ConnectionError:
        pass
    return got


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-a: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab",
    ],
)
@pytest.mark.parametrize("before", [b"", GET])
def test_a_request_that_does_not_come_whole_is_given_up(said, before):
    async def talk(connect):
        reader, writer = await connect()
        writer.write(before + said)
        return await rest(reader)

    assert serve(talk).count(b"200 OK") == bool(before)


@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\nHost: x\r\nX-a: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n"],
)
def test_nor_does_it_live_of_single_bytes(head):
    async def talk(connect):
        reader, writer = await connect()
        writer.write(head)
        ended = asyncio.create_task(rest(reader))
        while not ended.done():
            writer.write(b"a")
            await asyncio.sleep(0.05)
        return ended.result()

    assert b"200 OK" not in serve(talk)


def test_an_answer_that_is_not_taken_is_given_up():
    async def talk(connect):
        reader, writer = await connect()
        writer.transport.pause_reading()
        writer.write(GET.replace(b"/ ", b"/large "))
        await asyncio.sleep(1)
        writer.transport.resume_reading()
        return len(await rest(reader))

    assert serve(talk) < len(LARGE)


def test_who_takes_it_gets_it_whole(monkeypatch):
    monkeypatch.setattr(connections, "STALL_SECONDS", 60)

    async def talk(connect):
        reader, writer = await connect()
        writer.write(GET.replace(b"/ ", b"/large "))
        await reader.readuntil(b"\r\n\r\n")
        return len(await reader.readexactly(len(LARGE)))

    assert serve(talk) == len(LARGE)


def test_the_oldest_that_says_nothing_makes_room(monkeypatch):
    monkeypatch.setattr(connections, "_SECONDS", dict.fromkeys(connections._SECONDS, 60))
    monkeypatch.setattr(connections, "MOST", 5)

    async def talk(connect):
        silent = [await connect() for _ in range(12)]
        for _, writer in silent:
            writer.write(b"GET / HTTP/1.1\r\nX-a: ")
        reader, writer = await connect()
        writer.write(GET)
        answer = await reader.readuntil(b"\r\n")
        first = await rest(silent[0][0])
        return answer, first, silent[-1][0].at_eof()

    assert serve(talk) == (b"HTTP/1.1 200 OK\r\n", b"", False)


def test_requests_go_on_over_one_connection():
    async def talk(connect):
        reader, writer = await connect()
        for _ in range(10):
            writer.write(GET)
            await reader.readuntil(b"ok")
            await asyncio.sleep(0.1)
        return True

    assert serve(talk)
