"""The server's application in this process: what it answers to every kind of request."""

import asyncio
import json
import random
import string

import pytest
import torch
from asgi import ask, call
from places import ROOT
from scripted_model import byte_ids, scripted_folder
from tiny_output import CHATML

pytest.importorskip("fastapi", reason="the server: pip install 'dbrx-quant[serve]'")

from dbrx_quant.runtime.talk import requests, turns
from dbrx_quant.runtime.talk.door import Visit
from dbrx_quant.runtime.talk.server import Limits, build_app

SCRIPT = "Hi_you!🙂"
CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GOOD = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    COMPLETE: {"prompt": "H"},
    RESPOND: {"input": "Hello"},
}
CONTEXT = 20_000
SECRET = "/home/somebody/secret.safetensors"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A model that says SCRIPT to a chat, and goes on for ever after a "a"."""
    folder = scripted_folder(tmp_path_factory.mktemp("server") / "m", SCRIPT, context=CONTEXT)
    made = build_app(folder, "m", "cpu", limits=Limits(queue=3, seconds=60))
    yield made
    made.app.state.service.close()


@pytest.fixture
def service(app):
    return app.app.state.service


@pytest.fixture
def endless(service, monkeypatch):
    """The same model without an end: it says its first token for ever."""
    monkeypatch.setattr(service.model.generation_config, "eos_token_id", None)
    steps = []
    handle = service.model.register_forward_pre_hook(lambda *_: steps.append(1))
    yield steps
    handle.remove()


def text(path, got):
    if path == RESPOND:
        return got.json["output"][0]["content"][0]["text"]
    choice = got.json["choices"][0]
    return choice["text"] if path == COMPLETE else choice["message"]["content"]


@pytest.mark.parametrize("path", GOOD)
def test_the_plain_request_is_answered(app, path):
    got = ask(app, path, GOOD[path])
    assert got.status == 200
    assert text(path, got) == (SCRIPT[1:] if path == COMPLETE else SCRIPT)


@pytest.mark.parametrize("path", GOOD)
def test_it_is_streamed_on_request(app, path):
    got = ask(app, path, {**GOOD[path], "stream": True, "stream_options": {"include_usage": True}})
    assert got.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in got.body.decode().split("\n\n") if line]
    usage = events[-1]["response"]["usage"] if path == RESPOND else events[-1]["usage"]
    assert usage["total_tokens"] > len(SCRIPT)


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


def test_other_models_paths_and_methods_are_not_there(app):
    assert ask(app, CHAT, {**GOOD[CHAT], "model": "gpt2"}).status == 404
    for path in ("/", "/reset", "/load_model", "/docs", "/openapi.json", "/v1/embeddings"):
        assert ask(app, path, {}).status == 404
        assert ask(app, path, method="GET").status == 404
    assert ask(app, CHAT, method="GET").status == 405
    assert ask(app, "/v1/models", {}).status == 405


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


def test_stops_need_not_be_tokens_of_the_vocabulary(app):
    got = ask(app, CHAT, {**GOOD[CHAT], "stop": ["u!", "\u200b\uffff", "☃" * 80]})
    assert (text(CHAT, got), got.json["choices"][0]["finish_reason"]) == ("Hi_you!", "stop")


def test_penalties_and_bias_are_openais():
    steer = turns._Steer(2, 0.5, 1.0, {3: -100.0})
    made = steer(torch.tensor([[0, 1, 1, 2, 2]]), torch.zeros(1, 5))
    assert made.tolist() == [[0.0, -1.5, -2.0, -100.0, 0.0]]


def test_a_bias_on_a_token_that_is_not_there_is_refused(app):
    assert (
        ask(app, CHAT, {**GOOD[CHAT], "logit_bias": {"300": 1}}).message
        == "logit_bias: no token 300; the model has 300"
    )
    got = ask(
        app,
        CHAT,
        {
            **GOOD[CHAT],
            "logit_bias": {str(byte_ids("i")[0]): -100, str(byte_ids("_")[0]): 100},
            "max_tokens": 2,
        },
    )
    assert text(CHAT, got) == "__"


def test_a_seed_is_set_where_one_is_given_and_else_a_new_one(app, service, monkeypatch):
    seeds, generate = [], service.model.generate

    def noting(*arguments, **options):
        seeds.append(torch.initial_seed())
        return generate(*arguments, **options)

    monkeypatch.setattr(service.model, "generate", noting)
    for seed in ({"seed": 7}, {}, {"seed": 7}, {}):
        assert ask(app, COMPLETE, {**GOOD[COMPLETE], **seed}).status == 200
    assert (seeds[0], seeds[2], len({*seeds})) == (7, 7, 3)


def test_prompt_and_answer_stay_within_the_context(app, service, monkeypatch):
    monkeypatch.setattr(service, "context", 128)
    got = ask(app, COMPLETE, {"prompt": "H" * 126, "max_tokens": 50})
    assert got.json["usage"]["total_tokens"] == 128
    assert got.json["choices"][0]["finish_reason"] == "length"
    got = ask(app, COMPLETE, {"prompt": "x" * 128})
    assert got.status == 400
    assert "prompt: the request has 128 tokens, the model's context is 128" in got.message


def test_tools_count_and_are_refused_where_the_template_knows_none(app, service, monkeypatch):
    assert "does not know it" in ask(app, CHAT, {**GOOD[CHAT], "tools": [TOOL]}).message
    assert (
        "enable_thinking"
        in ask(app, CHAT, {**GOOD[CHAT], "chat_template_kwargs": {"enable_thinking": True}}).message
    )
    monkeypatch.setattr(service.tokenizer, "chat_template", "{{ tools | tojson if tools }}" + CHATML)
    without = ask(app, CHAT, GOOD[CHAT]).json["usage"]["prompt_tokens"]
    told = ask(app, CHAT, {**GOOD[CHAT], "tools": [TOOL]}).json["usage"]["prompt_tokens"]
    unused = ask(app, CHAT, {**GOOD[CHAT], "tools": [TOOL], "tool_choice": "none"}).json["usage"][
        "prompt_tokens"
    ]
    assert (told > without + 50, unused == without) == (True, True)
    flat = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}
    assert ask(app, RESPOND, {**GOOD[RESPOND], "tools": [flat]}).json["usage"]["input_tokens"] == told
    large = {**TOOL, "function": {**TOOL["function"], "description": "x" * 2 * CONTEXT}}
    assert "the model's context is" in ask(app, CHAT, {**GOOD[CHAT], "tools": [large]}).message


def test_a_template_that_refuses_or_never_ends_costs_its_request_alone(app, service, monkeypatch):
    monkeypatch.setattr(service.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in ask(app, CHAT, GOOD[CHAT]).message
    monkeypatch.setattr(service.texts, "_seconds", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(service.tokenizer, "chat_template", endless)

    async def both():
        hung = asyncio.create_task(call(app, CHAT, GOOD[CHAT]))
        health = await call(app, "/health", method="GET")
        return hung.done(), health.status, (await hung).message

    done, health, message = asyncio.run(both())
    assert (done, health) == (False, 200)
    assert "took longer than 1 s" in message
    monkeypatch.undo()
    assert text(CHAT, ask(app, CHAT, GOOD[CHAT])) == SCRIPT


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_computed_for_a_client_that_left(app, service, endless, stream):
    async def leave():
        left = asyncio.Event()
        body = {"prompt": "H", "max_tokens": 15_000, "stream": stream}
        running = asyncio.create_task(call(app, COMPLETE, body, leave=left))
        queued = asyncio.create_task(call(app, COMPLETE, body, leave=left))
        while len(endless) < 5:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.gather(running, queued)

    asyncio.run(leave())
    service.turns.thread.submit(lambda: None).result(60)
    assert len(endless) < 10_000
    before = len(endless)
    assert ask(app, COMPLETE, {"prompt": "H", "max_tokens": 3}).json["usage"]["completion_tokens"] == 3
    assert len(endless) == before + 3


def test_an_answer_whose_time_is_over_is_cut_off(app, service, endless, monkeypatch):
    monkeypatch.setattr(service.turns, "seconds", 0.2)
    got = ask(app, COMPLETE, {"prompt": "H", "max_tokens": 15_000})
    assert got.json["choices"][0]["finish_reason"] == "length"
    assert 0 < got.json["usage"]["completion_tokens"] < 15_000


def test_a_prompt_that_takes_all_the_time_is_refused(app, service, monkeypatch):
    monkeypatch.setattr(service.turns, "seconds", 0)
    got = ask(app, COMPLETE, {"prompt": "x" * 500})
    assert (got.status, "not read in 0 s" in got.message) == (400, True)
    got = ask(app, COMPLETE, {"prompt": "x" * 500, "stream": True})
    assert "not read in 0 s" in json.loads(got.body.decode()[6:])["error"]


def test_a_long_prompt_is_left_between_layers_and_no_hook_stays(service):
    model, calls = service.model, []

    def go_on():
        calls.append(1)
        if len(calls) == 2:
            raise turns.StoppedError("enough")

    with turns._watched(model, go_on, 500), pytest.raises(turns.StoppedError):
        model(input_ids=torch.zeros(1, 500, dtype=torch.long))
    assert len(calls) == 2
    assert not any(module._forward_pre_hooks for module in model.transformer.modules())


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_inside_is_told_without_its_details(app, service, monkeypatch, path, stream):
    def fail(*_, **__):
        raise OSError(2, 'No "such" file', SECRET)

    monkeypatch.setattr(service.model, "generate", fail)
    got = ask(app, path, {**GOOD[path], "stream": stream})
    assert "the server failed; its log says why" in got.body.decode()
    assert SECRET not in got.body.decode()
    for line in got.body.decode().split("\n\n") if stream else ():
        json.loads(line[6:] or "0")
    assert stream or got.status == 500


def test_the_models_own_settings_are_kept_but_for_what_costs(service):
    config = service.model.generation_config
    config.num_beams, config.max_time, config.stop_strings, config.top_k = 20_000, 1e9, ["x"], 7
    eos = config.eos_token_id
    kept = turns.Turns(service.model, service.tokenizer, 1).model.generation_config
    assert (kept.num_beams, kept.max_time, kept.stop_strings) == (None, None, None)
    assert (kept.top_k, kept.eos_token_id) == (7, eos)
    kept.top_k = None


def test_a_closed_server_starts_nothing(service):
    other = turns.Turns(service.model, service.tokenizer, 1)
    other.close()
    turn = turns.Turn(other, None, Visit(None, "x"))
    with pytest.raises(turns.StoppedError):
        turn._generate({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, None)
