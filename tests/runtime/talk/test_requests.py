"""Requests as a client may write them: what is taken, what is refused and by which name."""

import json
import random
import string

import pytest
from asgi import ask
from places import ROOT
from server_requests import CHAT, COMPLETE, GOOD, RESPOND, TOOL
from tiny_output import CHATML

pytest.importorskip("fastapi", reason="the server: pip install 'dbrx-quant[serve]'")

from dbrx_quant.runtime.talk import requests

pytest_plugins = ["server_fixtures"]


def test_null_is_as_good_as_absent(app):
    nothing = dict.fromkeys(("stop", "n", "tools", "max_tokens", "temperature", "logprobs", "frobnicate"))
    assert ask(app, CHAT, {**GOOD[CHAT], **nothing}).status == 200


NOT_SERVED = {
    "all": {
        "frobnicate": 1,
        "generation_config": "{}",
        "model": 5,
        "stream": "yes",
        "temperature": 2.1,
        "top_p": -0.1,
        "top_k": -1,
        "min_p": 2,
        "repetition_penalty": 0,
        "seed": 2**70,
        "user": {"name": "x"},
        "num_beams": 20000,
    },
    "texts": {
        "max_tokens": 0,
        "stop": 5,
        "frequency_penalty": 3,
        "presence_penalty": "x",
        "logit_bias": {"x": 1},
        "logprobs": True,
        "n": 2,
    },
    "chats": {
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "service_tier": "flex",
        "store": True,
        "top_logprobs": 5,
        "metadata": "x",
        "tools": [{}],
        "chat_template_kwargs": {"chat_template": "x"},
    },
    CHAT: {
        "messages": 7,
        "audio": {},
        "function_call": "auto",
        "functions": [],
        "max_completion_tokens": 1.5,
        "modalities": ["audio"],
        "prediction": {},
        "reasoning_effort": "high",
        "response_format": {"type": "json_object"},
        "verbosity": "low",
        "web_search_options": {},
    },
    COMPLETE: {"prompt": ["H"], "best_of": 2, "echo": True, "suffix": "!"},
    RESPOND: {
        "input": {},
        "background": True,
        "conversation": "x",
        "include": ["reasoning.encrypted_content"],
        "instructions": 5,
        "max_output_tokens": 0,
        "max_tool_calls": 1,
        "previous_response_id": "x",
        "prompt": {"id": "x"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_object"}},
        "truncation": "auto",
    },
}
KINDS = {
    CHAT: ("all", "texts", "chats", CHAT),
    COMPLETE: ("all", "texts", COMPLETE),
    RESPOND: ("all", "chats", RESPOND),
}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, f, v) for path, kinds in KINDS.items() for kind in kinds for f, v in NOT_SERVED[kind].items()],
)
def test_what_is_not_served_is_refused_by_its_name(app, path, field, value):
    got = ask(app, path, {**GOOD[path], field: value})
    assert got.status == 400
    assert got.message.startswith(field)


@pytest.mark.parametrize("path", GOOD)
def test_what_asks_for_what_is_done_anyway_is_taken(app, path):
    every = {
        "model": "m",
        "stream": False,
        "seed": -5,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "user": "x",
    }
    texts = {"n": 1, "logprobs": False, "logit_bias": {"5": 1}, "stop": ["z"], "presence_penalty": 1}
    chats = {
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "store": False,
        "metadata": {"a": "b"},
        "tools": [],
    }
    more = {
        CHAT: {**texts, **chats, "response_format": {"type": "text"}, "modalities": ["text"]},
        COMPLETE: {**texts, "best_of": 1, "echo": False, "suffix": ""},
        RESPOND: {**chats, "background": False, "include": [], "text": {"format": {"type": "text"}}},
    }
    assert ask(app, path, {**GOOD[path], **every, **more[path]}).status == 200


@pytest.mark.parametrize("kind", [requests.Chat, requests.Completion, requests.Response])
def test_the_documentation_names_every_field(kind):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [name for name in kind.model_fields if f"`{name}" not in page] == []


ODD_MESSAGES = [
    "x",
    {},
    {"role": "user"},
    {"role": "wizard", "content": "x"},
    {"role": ["user"], "content": "x"},
    {"role": "user", "content": [{"text": "x"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
    {"role": "user", "content": {"type": "text", "text": "x"}},
    {"role": "user", "content": [None]},
    {"role": "assistant", "tool_calls": [{}]},
    {"role": "assistant", "tool_calls": "x"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    {"role": "tool", "tool_call_id": 5, "content": "x"},
    {"role": "user", "content": "x", "frobnicate": 1},
]


@pytest.mark.parametrize("message", ODD_MESSAGES, ids=repr)
@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (RESPOND, "input")])
def test_odd_messages_are_refused_by_their_place(app, path, field, message):
    got = ask(app, path, {field: [{"role": "user", "content": "x"}, message]})
    if got.status == 200:
        assert message == {"role": "user"}, "null content is an empty one"
        assert path == CHAT
    else:
        assert (got.status, got.message[: len(field) + 3]) == (400, f"{field}[1]")


def test_items_of_a_response_become_messages(app, service, monkeypatch):
    seen = []
    encode = service.texts.encode_chat
    monkeypatch.setattr(service.texts, "encode_chat", lambda *a, **k: (seen.append(a[0]), encode(*a, **k))[1])
    items = [
        {"type": "input_text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "5"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]},
    ]
    assert ask(app, RESPOND, {"input": items, "instructions": "I"}).status == 200
    (messages,) = seen
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "I"),
        ("user", "a b"),
        ("assistant", ""),
        ("tool", "5"),
        ("user", "c"),
    ]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"prompt": "\xff"}',
        rb'{"prompt": "\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_no_json_of_ours_is_refused(app, body):
    got = ask(app, COMPLETE, body)
    assert got.status == 400
    assert got.json["error"]["type"] == "invalid_request_error"


def odd_value(draw, depth=0):
    """Something that JSON can hold and nobody expects."""
    simple = (
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**70),
        10**400,
        0.5,
        1e308,
        "",
        "x",
        "a" * 300,
        "\0",
        "é🙂\u2028",
        [],
        {},
    )
    if depth > 2 or draw.random() < 0.6:
        return draw.choice(simple)
    if draw.random() < 0.5:
        return [odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = ("role", "content", "type", "text", "function", "name", "arguments", "id", "x", "")
    return {draw.choice(keys): odd_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def mutate(draw, value):
    """A copy of a JSON value with one place of it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {**value, key: mutate(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        return [*value[:index], mutate(draw, value[index]), *value[index + 1 :]]
    return odd_value(draw)


def test_no_body_whatever_fails_inside(app, service, monkeypatch):
    """A seeded walk: every field with odd values, places deep inside changed, bytes changed."""
    draw = random.Random(5)
    template = "{{ tools | tojson if tools }}{{ enable_thinking }}" + CHATML
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    full = {
        CHAT: {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "y"},
            ],
            "tools": [TOOL],
            "logit_bias": {"5": 1.5},
            "chat_template_kwargs": {"enable_thinking": True},
        },
        COMPLETE: {"prompt": "x", "stop": ["a", "b"], "logit_bias": {"5": 1.5}},
        RESPOND: {
            "input": [
                {"role": "user", "content": "x"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            ],
            "text": {"format": {"type": "text"}},
        },
    }
    fields = {path: [f for kind in kinds for f in NOT_SERVED[kind]] for path, kinds in KINDS.items()}
    limit = {CHAT: "max_tokens", COMPLETE: "max_tokens", RESPOND: "max_output_tokens"}
    found = {}
    for turn in range(400):
        path = draw.choice(list(GOOD))
        body = {limit[path]: 2, **GOOD[path]}
        if turn % 3 == 0:
            body[draw.choice(fields[path])] = odd_value(draw)
        elif turn % 3 == 1:
            body = mutate(draw, {**body, **full[path]})
        raw = bytearray(json.dumps(body).encode())
        if turn % 3 == 2:
            for _ in range(draw.randrange(1, 4)):
                raw[draw.randrange(len(raw))] = draw.choice(string.printable.encode() + b"\xff\xc3")
        got = ask(app, path, bytes(raw))
        assert got.status in (200, 400, 404), (path, bytes(raw), got)
        found[got.status] = found.get(got.status, 0) + 1
        if got.status != 200:
            assert got.message
    assert min(found[200], found[400]) > 20
