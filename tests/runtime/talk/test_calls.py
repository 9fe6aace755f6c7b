"""Calls of tools as models write them, well and badly."""

import pytest

pytest.importorskip("fastapi", reason="the server: pip install 'dbrx-quant[serve]'")

from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

from dbrx_quant.runtime.talk.calls import CallParser, tolerant

TEMPLATE = next(value for kinds, value in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3_moe" in kinds)
PREFIX = "<|im_start|>assistant\n"
GOOD = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
BAD = ["{bad}", "[1]", '{"x": 1}', "5", '{"name": "f"}', "null", ""]


def streamed(text, size):
    parser = CallParser(ResponseParser(TEMPLATE, prefix=PREFIX))
    events = [*parser.initial_events]
    for start in range(0, len(text), size):
        events += parser.feed(text[start : start + size])
    return response_events_to_chunks(events + parser.finalize()[1])


def whole(text):
    def parse(ids, *_):
        parser = ResponseParser(TEMPLATE, prefix=PREFIX)
        parser.feed(text)
        return parser.finalize()[0]

    return tolerant(parse, lambda ids, skip_special_tokens: text)([1], None)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_call_is_one_and_text_around_it_is_text(size):
    *text, call = streamed(f"Look:{GOOD}", size)
    assert ("".join(text), call.name, call.arguments) == ("Look:", "f", '{"x": 1}')
    assert whole(GOOD)["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("body", BAD)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_is_none_raises_nothing_and_what_follows_arrives(body, size):
    text = f"<tool_call>\n{body}\n</tool_call> and so on"
    assert "".join(map(str, streamed(text, size))).endswith("and so on" if size < 1000 else text)
    assert whole(text) == {"content": text}


@pytest.mark.parametrize("end", range(0, len(GOOD), 3))
def test_a_call_that_is_cut_off_raises_nothing(end):
    streamed(GOOD[:end], 4)
    assert isinstance(whole(GOOD[:end]), dict)
