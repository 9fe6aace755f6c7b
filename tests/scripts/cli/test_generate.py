"""`generate` as a user meets it: whole characters as they come, the turn's end, Ctrl-C, pipes and JSON."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from scripted_model import byte_ids, scripted_folder

import dbrx_quant.runtime.model.load as loader
from dbrx_quant.scripts.cli.main import main

SCRIPT = "Hi_you!🙂"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scripted_folder(tmp_path_factory.mktemp("scripted") / "model", SCRIPT)


def run(capsys, *arguments):
    code = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_answer_ends_with_the_turn_and_stdout_has_nothing_else(folder, capsys):
    assert run(capsys, folder, "Hello", "--chat", "--quiet") == (0, f"{SCRIPT}\n", "")


def test_a_text_goes_on_to_its_end(folder, capsys):
    assert run(capsys, folder, "_", "--quiet")[1] == "you!🙂\n"


def test_a_prompt_comes_from_stdin(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("_"))
    assert run(capsys, folder, "-", "--quiet")[1] == "you!🙂\n"


def test_a_character_cut_short_shows_as_such_once(folder, capsys):
    tokens = len(b"i_you!") + 2  # half of the emoji
    code, out, _ = run(capsys, folder, "H", "--quiet", "--max-new-tokens", tokens)
    told = json.loads(run(capsys, folder, "H", "--json", "--max-new-tokens", tokens)[1])
    assert (code, out) == (0, "i_you!\ufffd\n")
    assert (told["text"], told["stopped"], told["new_tokens"]) == ("i_you!\ufffd", "length", tokens)


def test_json_tells_why_it_ended(folder, capsys):
    told = json.loads(run(capsys, folder, "Hello", "--chat", "--json")[1])
    assert (told["text"], told["stopped"]) == (SCRIPT, "end of text")


def test_json_has_the_text_until_ctrl_c(folder, capsys, monkeypatch):
    load = loader.load_model

    def interrupted(*arguments, **options):
        model, calls = load(*arguments, **options), []

        def hook(*_):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(hook)
        return model

    monkeypatch.setattr(loader, "load_model", interrupted)
    code, out, err = run(capsys, folder, "H", "--json")
    told = json.loads(out)
    assert code == 130
    assert (told["text"], told["stopped"], told["new_tokens"]) == ("i_yo", "interrupted", 4)
    assert err.splitlines()[-1] == "dbrx-quant: interrupted"
    code, out, _ = run(capsys, folder, "H")
    assert (code, out) == (130, "i_yo\n")


def test_a_pipe_has_the_text_at_once_and_keeps_it_after_ctrl_c(tmp_path):
    folder = scripted_folder(tmp_path / "endless", "🙂abc", then=byte_ids("a")[0], context=100_000)
    arguments = ["generate", str(folder), "Hello", "--chat", "--max-new-tokens", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dbrx_quant.scripts.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = os.read(process.stdout.fileno(), 4)
    while len(first) < 40:
        first += os.read(process.stdout.fileno(), 40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    text = (first + out).decode()
    assert process.returncode == 130
    assert text.endswith("\n")
    assert text.strip("\n") == "🙂" + ("abc" * len(text))[: len(text) - 2]
    assert err.decode().splitlines()[-1] == "dbrx-quant: interrupted"
