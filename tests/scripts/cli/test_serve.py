"""`dbrx-quant serve` over loopback, as OpenAI's client sees it: chats, streams, errors, kill and restart."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_model import byte_ids, scripted_folder

from dbrx_quant.runtime.folder import find
from dbrx_quant.scripts.cli.main import main
from dbrx_quant.scripts.cli.serve import api_key, example, port
from dbrx_quant.scripts.terminal.output import model_title

openai = pytest.importorskip("openai", reason="the server and its client: pip install 'dbrx-quant[serve]'")
pytest.importorskip("fastapi", reason="the server: pip install 'dbrx-quant[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'dbrx-quant[serve]'")

SCRIPT = "Hi_you!🙂"
TOKENS = len(SCRIPT.encode()) + 1
HELLO = [{"role": "user", "content": "Hello"}]
KEY = "secret-key"


class Server:
    """The command as a process, up when the object is there."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dbrx_quant.scripts.cli.main", "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "DBRXQ_API_KEY": ""},
        )
        self.lines = []
        self.url = ""
        while not self.url:
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(self.process.stderr.read())
            self.lines.append(line)
            self.url = "".join(re.findall(r"served at (\S+);", line))
        self.lines.append(self.process.stdout.readline())  # the example
        self.log = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def client(self, key="none"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def stop(self, number):
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@dataclass
class Killed:
    """How a server ended that was killed while it answered."""

    code: int
    log: str
    text: str


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with an endless answer, killed amid it, and another on the same port."""
    folder = tmp_path_factory.mktemp("served")
    endless = scripted_folder(folder / "endless", "🙂abc", then=byte_ids("a")[0], context=100_000)
    scripted = scripted_folder(folder / "scripted" / "3.0bpw", SCRIPT)
    first = Server(endless, "--port", 0)
    stream = first.client().chat.completions.create(
        model="endless", messages=HELLO, stream=True, max_tokens=50_000
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if len(text) > 20:
            break
    killed = Killed(first.stop(signal.SIGINT), "".join(first.log), text)
    number = int(first.url.rsplit(":", 1)[1].split("/")[0])
    second = Server(scripted, "--port", number, "--api-key", KEY)
    yield killed, second
    if second.process.poll() is None:
        assert second.stop(signal.SIGTERM) == 75


@pytest.fixture(scope="module")
def server(served):
    return served[1]


@pytest.fixture(scope="module")
def client(server):
    return server.client(KEY)


def test_ctrl_c_ends_it_at_once_also_amid_an_answer(served):
    killed, _ = served
    assert killed.text.startswith("🙂abcabcabc")
    assert killed.code == 0
    assert "stopped" in killed.log


def test_it_tells_where_it_listens_and_how_to_ask(server):
    assert server.lines[0].startswith("scripted-3.0bpw is served at http://127.0.0.1:")
    assert server.lines[1].strip() == example(server.url, "scripted-3.0bpw", KEY)


def test_the_example_is_a_command_that_answers(server):
    command = server.lines[1].replace("$DBRXQ_API_KEY", KEY)
    if not any(os.access(os.path.join(p, "curl"), os.X_OK) for p in os.environ["PATH"].split(":")):
        pytest.skip("no curl here")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == SCRIPT


def test_one_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["scripted-3.0bpw"]


def test_a_chat_ends_with_the_turn(client):
    made = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO)
    assert made.choices[0].message.content == SCRIPT
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens == TOKENS
    assert made.usage.prompt_tokens == len("user\nHello\nassistant\n") + 3


def test_a_chat_is_streamed_in_whole_characters(client):
    stream = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
    assert pieces == ["H", "i", "_", "y", "o", "u", "!", "🙂"]
    assert chunks[-1].finish_reason == "stop"


def test_a_limit_cuts_the_answer_off(client):
    made = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO, max_tokens=3)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("Hi_", "length")


def test_an_answer_never_leaves_the_context(client):
    long = [{"role": "user", "content": "x" * 100}]
    made = client.chat.completions.create(model="scripted-3.0bpw", messages=long, max_tokens=1000)
    assert made.usage.total_tokens == 128
    assert made.choices[0].finish_reason == "length"


def test_texts_are_completed_and_responses_made(client):
    made = client.completions.create(model="scripted-3.0bpw", prompt="H", max_tokens=4)
    assert made.choices[0].text == "i_yo"
    made = client.responses.create(model="scripted-3.0bpw", input=HELLO)
    assert made.output_text == SCRIPT


def test_sampling_options_are_taken(client):
    made = client.chat.completions.create(
        model="scripted-3.0bpw", messages=HELLO, temperature=0.5, top_p=0.9, seed=1, stop=["_"]
    )
    assert made.choices[0].message.content == "Hi_"
    made = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO, temperature=0)
    assert made.choices[0].message.content == SCRIPT


def test_two_requests_at_once_are_both_answered(client):
    results = {}

    def ask(name):
        stream = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO, stream=True)
        results[name] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {"a": SCRIPT, "b": SCRIPT}


def test_other_models_are_refused_and_not_fetched(client):
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'gpt2' here; this server has 'scripted-3.0bpw'"
    ):
        client.chat.completions.create(model="gpt2", messages=HELLO)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "messages must be a non-empty list"),
        ({"messages": "Hello"}, 400, "messages must be a non-empty list"),
        ({"messages": None}, 400, "messages is missing"),
        ({"messages": ["Hello"]}, 400, r"messages[0] must be an object"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, r"messages[0].content must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content[0].type: only 'text'",
        ),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, 400, "the model's context is 128"),
        ({"max_tokens": 0}, 400, "max_tokens must be a whole number"),
        ({"max_tokens": "many"}, 400, "max_tokens must be a whole number"),
        ({"temperature": -1}, 400, "temperature must be a number from 0 to 2"),
        ({"top_p": "x"}, 400, "top_p must be a number from 0 to 1"),
        ({"frobnicate": 1}, 400, "frobnicate: no such field"),
    ],
)
def test_bad_requests_are_told_what_is_wrong_and_the_server_lives(client, change, status, message):
    body = {"model": "scripted-3.0bpw", "messages": HELLO, **change}
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.status_code == status
    assert message in refused.value.body["message"]
    made = client.chat.completions.create(model="scripted-3.0bpw", messages=HELLO)
    assert made.choices[0].message.content == SCRIPT


def raw(server, path, body=None, key=KEY):
    """(status, answer) of a request by hand."""
    request = urllib.request.Request(
        server.url.removesuffix("/v1") + path,
        body,
        {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_what_is_no_json_is_refused(server):
    status, answer = raw(server, "/v1/chat/completions", b"{")
    assert status == 400
    assert "not a valid JSON object" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/audio/transcriptions", "/v1/systemone", "/"])
def test_other_paths_are_not_there(server, path):
    assert raw(server, path, b'{"model": "gpt2"}')[0] == 404


def test_a_key_is_wanted_where_one_was_set(server):
    for key in (None, "wrong"):
        assert raw(server, "/v1/models", key=key)[0] == 401
    with pytest.raises(openai.AuthenticationError, match="missing or wrong API key"):
        server.client("wrong").models.list()
    assert raw(server, "/health", key=None) == (200, {"status": "ok"})


def test_a_strangers_name_does_not_lead_to_it(server):
    request = urllib.request.Request(server.url + "/models", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 403


def key_of(**given):
    return api_key(argparse.Namespace(**{"api_key": None, "api_key_file": None, **given}))


def test_a_key_comes_from_its_option_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DBRXQ_API_KEY", raising=False)
    assert key_of() is None
    monkeypatch.setenv("DBRXQ_API_KEY", "from-outside")
    assert key_of() == "from-outside"
    assert key_of(api_key="named") == "named"
    (tmp_path / "key").write_text(" in-a-file\n")
    assert key_of(api_key_file=tmp_path / "key") == "in-a-file"


@pytest.mark.parametrize("content", ["", "\n", "two words", "two\nlines", "sécret", "a\0b", "x" * 5000])
def test_what_no_client_can_send_is_no_key(tmp_path, content):
    (tmp_path / "key").write_text(content)
    with pytest.raises(ValueError, match="key: a key is 1 to 4096 letters"):
        key_of(api_key_file=tmp_path / "key")


def test_a_key_file_that_is_missing_is_told(tmp_path, capsys):
    assert main(["serve", "none", "--port", "0", "--api-key-file", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert main(["serve", "no/such/folder", "--port", str(number)]) == 1
    assert f"cannot listen on 127.0.0.1:{number}: Address already in use" in capsys.readouterr().err


def test_an_open_door_is_told(monkeypatch, capsys):
    monkeypatch.delenv("DBRXQ_API_KEY", raising=False)
    assert main(["serve", "no/such/folder/at/all", "--port", "0", "--host", "127.0.0.1"]) == 1
    assert "everyone" not in capsys.readouterr().err
    monkeypatch.setattr(find, "find_folder", lambda *_: Path("none"))
    assert main(["serve", "none", "--port", "0", "--host", "0.0.0.0"]) == 1
    assert "warning: everyone who can reach this machine" in capsys.readouterr().err


def test_a_missing_extra_is_told_with_the_way_out(monkeypatch, capsys):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    assert main(["serve", "folder"]) == 1
    assert "pip install 'dbrx-quant[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "65536", "http", ""])
def test_bad_ports_are_usage_errors(text):
    with pytest.raises(argparse.ArgumentTypeError, match="0 to 65535"):
        port(text)


def test_models_are_called_by_their_folder(tmp_path):
    (tmp_path / "dbrx" / "3.25bpw").mkdir(parents=True)
    assert model_title(f"{tmp_path}/dbrx") == "dbrx"
    assert model_title(f"{tmp_path}/dbrx/3.25bpw") == "dbrx-3.25bpw"
    assert model_title("databricks/dbrx-instruct") == "databricks/dbrx-instruct"
