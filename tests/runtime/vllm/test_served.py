"""The OpenAI server of vLLM on a converted DBRX: streams side by side, probabilities, JSON, a restart."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from places import TINY
from vllm_served import free_port, post, served, stream

from dbrx_quant import ConvertOptions, convert, load_model
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test_vllm.sh makes an environment with it")

PATH = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model"
    convert(ConvertOptions(TINY, path, targets=(3.0,), calibration="offline", rows=8, length=128, quiet=True))
    return path


@pytest.fixture(scope="module")
def port(folder):
    number = free_port()
    with served(folder, folder.parent / "log", number):
        yield number


@pytest.fixture(scope="module")
def texts(folder):
    """20 starts of lines of the held-out text."""
    lines = [line for line in (TINY / "heldout.txt").read_text().splitlines() if len(line) > 30]
    return [line[:30] for line in lines[:20]]


def test_twenty_prompts_over_http_are_continued_as_by_our_own_runtime(folder, port, texts):
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        expected = tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)
        answer = post(port, PATH, prompt=ids[0].tolist(), max_tokens=16, temperature=0)
        assert answer["choices"][0]["text"] == expected


def test_sixteen_streams_at_once_say_what_each_says_alone(port, texts):
    def ask(text):
        return stream(port, PATH, prompt=text, max_tokens=24, temperature=0)

    alone = [ask(text) for text in texts[:16]]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(ask, texts[:16]))
    assert [("".join(pieces), reason) for pieces, reason in together] == [
        ("".join(pieces), reason) for pieces, reason in alone
    ]
    assert max(len(pieces) for pieces, _ in together) > 1


def test_log_probabilities_are_those_of_our_own_runtime(folder, port):
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = tokenizer.encode("def main(", add_special_tokens=False)
    answer = post(port, PATH, prompt=ids, max_tokens=1, temperature=0, logprobs=5)
    found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(0).topk(5)
    assert sorted(found.values(), reverse=True)[:5] == pytest.approx(expected.values.tolist(), abs=1e-3)


def test_answers_keep_to_a_json_schema(port):
    answer = post(
        port,
        PATH,
        prompt="A person as JSON: ",
        max_tokens=120,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
    )
    assert answer["choices"][0]["finish_reason"] == "stop"
    person = json.loads(answer["choices"][0]["text"])
    assert person.keys() == {"name", "age"}
    assert isinstance(person["age"], int)


def test_a_killed_server_starts_again_on_its_port_and_answers_the_same(folder, tmp_path):
    number, answers = free_port(), []
    for _ in range(2):
        with served(folder, tmp_path / "log", number) as process:
            answers.append(post(number, PATH, prompt="import os", max_tokens=8, temperature=0)["choices"][0])
            process.send_signal(signal.SIGKILL)
    assert answers[0]["text"] == answers[1]["text"]
