"""The server's application in this process: what it answers, what that may cost, and how it fails."""

import asyncio
import json

import pytest
import torch
from asgi import ask, call
from scripted_model import byte_ids
from server_requests import CHAT, COMPLETE, CONTEXT, GOOD, RESPOND, SCRIPT, TOOL, text
from tiny_output import CHATML

pytest.importorskip("fastapi", reason="the server: pip install 'dbrx-quant[serve]'")

from dbrx_quant.runtime.talk import turns
from dbrx_quant.runtime.talk.door import Visit

pytest_plugins = ["server_fixtures"]

SECRET = "/home/somebody/secret.safetensors"


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


def test_other_models_paths_and_methods_are_not_there(app):
    assert ask(app, CHAT, {**GOOD[CHAT], "model": "gpt2"}).status == 404
    for path in ("/", "/reset", "/load_model", "/docs", "/openapi.json", "/v1/embeddings"):
        assert ask(app, path, {}).status == 404
        assert ask(app, path, method="GET").status == 404
    assert ask(app, CHAT, method="GET").status == 405
    assert ask(app, "/v1/models", {}).status == 405


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
