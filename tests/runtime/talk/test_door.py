"""The server's door with an application of three lines behind it."""

import asyncio
import time

import pytest
from asgi import ask, call

pytest.importorskip("starlette", reason="the server: pip install 'dbrx-quant[serve]'")

from dbrx_quant.runtime.talk.door import Door, Places

PATH = "/v1/completions"
MOST = 1000


class App:
    """Says what it was given, once it may; knows which requests are over."""

    def __init__(self):
        self.bodies, self.visits = [], []
        self.may_answer = None

    async def __call__(self, scope, receive, send):
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
            self.visits.append(scope["state"]["visit"])
        if self.may_answer is not None:
            await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def app():
    return App()


def test_a_body_arrives_whole_and_the_request_ends_with_its_answer(app):
    got = ask(Door(app, Places(1), MOST), PATH, pieces=[b'{"a"', b": 1}"])
    assert (got.status, app.bodies) == (200, [b'{"a": 1}'])
    assert app.visits[0].gone.is_set()


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "10.0.0.7:80", "llm", "a.localhost"]
)
def test_addresses_and_names_that_nobody_can_register_lead_in(app, host):
    assert ask(Door(app, Places(1), MOST), PATH, headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::1",
        "a.b@c.d",
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/health"])
def test_a_name_that_a_stranger_may_have_pointed_here_does_not(app, host, path):
    got = ask(
        Door(app, Places(1), MOST), path, headers={"host": host}, method="POST" if path == PATH else "GET"
    )
    assert got.status == 403
    assert "--allow-host" in got.message
    assert not app.bodies


@pytest.mark.parametrize("allowed", ["LLM.example", "*"])
def test_names_can_be_allowed(app, allowed):
    door = Door(app, Places(1), MOST, hosts=[allowed])
    assert ask(door, PATH, headers={"host": "llm.example:443"}).status == 200


@pytest.mark.parametrize("key", ["Bearer secret", "bearer secret", "Bearer  secret "])
def test_the_right_key_leads_in(app, key):
    assert ask(Door(app, Places(1), MOST, "secret"), PATH, headers={"authorization": key}).status == 200


@pytest.mark.parametrize(
    "key", [None, "", "secret", "Bearer", "Bearer wrong", "Bearer sécret", "Basic secret"]
)
def test_no_other_does(app, key):
    door = Door(app, Places(1), MOST, "secret")
    assert ask(door, PATH, headers={"authorization": key}).status == 401
    assert ask(door, "/v1/models", headers={"authorization": key}, method="GET").status == 401
    assert ask(door, "/health", headers={"authorization": key}, method="GET").status == 200
    assert not app.bodies


@pytest.mark.parametrize(
    "media", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_what_a_web_page_may_send_without_asking_is_refused(app, media):
    assert ask(Door(app, Places(1), MOST), PATH, headers={"content-type": media}).status == 415


def test_a_body_that_is_too_large_is_refused_unread(app):
    door = Door(app, Places(1), MOST)
    for said in ("1001", "9" * 30, "-1", "x"):
        got = ask(door, PATH, headers={"content-length": said})
        assert (got.status, got.headers["connection"]) == (413, "close")
    assert not app.bodies


def test_a_body_without_a_length_is_refused_where_it_gets_too_large(app):
    pieces = [b"x" * 400] * 5
    assert ask(Door(app, Places(1), MOST), PATH, pieces=pieces).status == 413
    assert not app.bodies


def test_one_more_than_the_queue_holds_is_told_when_to_come_back(app):
    async def crowd():
        app.may_answer = asyncio.Event()
        door = Door(app, Places(3), MOST)
        waiting = [asyncio.create_task(call(door, PATH)) for _ in range(3)]
        await asyncio.sleep(0)
        full = await call(door, PATH)
        health = asyncio.create_task(call(door, "/health", method="GET"))
        app.may_answer.set()
        answered = [(await one).status for one in waiting]
        return full, answered, (await health).status, (await call(door, PATH)).status

    full, *others = asyncio.run(crowd())
    assert (full.status, int(full.headers["retry-after"]) >= 1) == (503, True)
    assert others == [[200, 200, 200], 200, 200]


def test_a_client_that_leaves_ends_the_work_and_frees_its_place(app):
    async def leave():
        app.may_answer = asyncio.Event()
        door = Door(app, Places(1), MOST)
        left = asyncio.Event()
        request = asyncio.create_task(call(door, PATH, leave=left))
        while not app.visits:
            await asyncio.sleep(0)
        before = app.visits[0].gone.is_set()
        left.set()
        got = await request
        app.may_answer.set()
        return before, got, app.visits[0].gone.is_set(), (await call(door, PATH)).status

    assert asyncio.run(leave()) == (False, None, True, 200)


def test_a_client_that_leaves_amid_its_body_takes_no_place(app):
    async def leave():
        async def receive():
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "headers": [(b"content-type", b"application/json")],
        }
        places = Places(1)
        await Door(app, places, MOST)(scope, receive, None)
        return places.taken

    assert asyncio.run(leave()) == 0


def test_a_place_is_free_when_the_model_is_done_though_the_answer_is_on_its_way(app):
    async def slow():
        app.may_answer = asyncio.Event()
        door = Door(app, Places(1), MOST)
        first = asyncio.create_task(call(door, PATH))
        while not app.visits:
            await asyncio.sleep(0)
        app.visits[0].leave()
        second = asyncio.create_task(call(door, PATH))
        while len(app.visits) < 2:
            await asyncio.sleep(0)
        app.may_answer.set()
        return (await first).status, (await second).status, (await call(door, PATH)).status

    assert asyncio.run(slow()) == (200, 200, 200)


def test_a_failure_behind_it_frees_the_place():
    async def broken(scope, receive, send):
        raise OSError("no")

    places = Places(1)
    with pytest.raises(OSError, match="no"):
        ask(Door(broken, places, MOST), PATH)
    assert places.taken == 0


def test_places_tell_how_long_the_last_requests_took():
    places = Places(5)
    assert places.wait() == 1
    for _ in range(20):
        places.take()
        places.leave(time.monotonic() - 30)
    assert places.taken == 0
    assert 1 <= places.wait() <= 30


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("a b", False), ("é", False), ("x" * 65, False)]
)
def test_an_answer_has_the_id_of_its_request(app, given, kept):
    got = ask(Door(app, Places(1), MOST), "/health", headers={"x-request-id": given}, method="GET")
    assert (got.headers["x-request-id"] == given) == kept
