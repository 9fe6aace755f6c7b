"""`dbrx-quant tokenizer` finds what is wrong with a folder, mends it, and loses nothing."""

import json
import os

import pytest
import torch
from tiny_output import (
    ADDED,
    CONFIG,
    TOKENIZER_CONFIG,
    VOCABULARY,
    make_output,
    make_tokenizer,
    tokenizer_json,
    write_json,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import dbrx_quant.runtime
from dbrx_quant.runtime.files import atomic
from dbrx_quant.scripts.cli.main import main

IM_END = ADDED["<|im_end|>"]


@pytest.fixture
def source(tmp_path):
    """A folder as DBRX came: a hole in the ids, no eos in the config, no generation config."""
    make_tokenizer(tmp_path / "source")
    write_json(tmp_path / "source" / "config.json", CONFIG)
    return tmp_path / "source"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("output"))


def run(capsys, *arguments):
    code = main(["tokenizer", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_check_prints_a_line_for_each_fault_and_changes_nothing(source, capsys):
    before = contents(source)
    code, out, err = run(capsys, source, "--check")
    assert (code, err) == (3, "")
    lines = out.splitlines()
    assert "tokenizer.json: '<|im_end|>' is declared as 260 but becomes 259 when loaded" in out
    assert any(line.startswith("config.json: eos_token_id is None, without [257, 260]") for line in lines)
    assert any(line.startswith("tokenizer_config.json: tokenizer_class is GPT2Tokenizer") for line in lines)
    assert any(line.startswith("generation_config.json: missing") for line in lines)
    assert contents(source) == before


def test_a_repair_mends_all_that_the_check_found(source, capsys):
    code, out, err = run(capsys, source)
    assert (code, err) == (0, "")
    assert "filled 1 unused id with placeholders: 256" in out
    assert "config.json: eos_token_id missing → [257, 260]" in out
    assert "generation_config.json: missing, created" in out
    assert run(capsys, source, "--check") == (
        0,
        f"{source}: sound: every token has its id, and chat turns end\n",
        "",
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == list(ADDED.values())
    assert json.loads((source / "config.json").read_text()) == {
        **CONFIG,
        "bos_token_id": 257,
        "eos_token_id": [257, 260],
        "pad_token_id": 258,
    }


def test_a_second_repair_has_nothing_to_do(source, capsys):
    run(capsys, source)
    before = contents(source)
    assert run(capsys, source) == (0, f"{source}: nothing to repair\n", "")
    assert contents(source) == before


def test_replaced_files_are_kept_as_they_were(source, capsys):
    before = contents(source)
    _, out, _ = run(capsys, source)
    assert "the original files are in tokenizer-before-repair/" in out
    kept = contents(source / "tokenizer-before-repair")
    assert kept == {name: before[name] for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    write_json(source / "generation_config.json", {"eos_token_id": 257, "temperature": 0.6})
    run(capsys, source)
    assert contents(source / "tokenizer-before-repair") == kept, "an earlier copy is never overwritten"
    assert set(contents(source / "tokenizer-before-repair-2")) == {"generation_config.json"}
    assert json.loads((source / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(source, capsys):
    before = contents(source)
    code, out, _ = run(capsys, source, "--dry-run")
    assert code == 0
    assert "filled 1 unused id" in out
    assert out.splitlines()[-1].startswith(f"{source}: would write tokenizer.json, tokenizer_config.json")
    assert contents(source) == before


def test_json_tells_faults_changes_and_files(source, capsys):
    checked = json.loads(run(capsys, source, "--check", "--json")[1])
    assert checked["ok"] is False
    code, out, _ = run(capsys, source, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["ok"], told["faults"], told["remaining"]) == (True, checked["faults"], [])
    assert "generation_config.json" in told["files"]
    assert told["kept"] == str(source / "tokenizer-before-repair")
    assert json.loads(run(capsys, source, "--json")[1])["files"] == []


def test_an_interrupted_repair_is_finished_by_the_next(source, capsys, monkeypatch):
    replace, calls = os.replace, []

    def failing(old, new):
        calls.append(new)
        if len(calls) == 6:  # three copies, two atomic, and then
            raise OSError(28, "No space left on device", str(new))
        replace(old, new)

    before = contents(source)
    monkeypatch.setattr(atomic.os, "replace", failing)
    code, _, err = run(capsys, source)
    assert code == 1
    assert "disk full" in err
    monkeypatch.undo()
    assert run(capsys, source)[0] == 0
    assert run(capsys, source, "--check")[0] == 0
    kept = contents(source / "tokenizer-before-repair")
    assert kept == {name: before[name] for name in kept}
    assert not list(source.glob(".*.part"))


def test_what_cannot_be_fixed_stays_reported(source, capsys):
    broken = {**TOKENIZER_CONFIG, "chat_template": "{{ nothing.at.all }}"}
    write_json(source / "tokenizer_config.json", broken)
    code, _, err = run(capsys, source)
    assert code == 3
    assert "still wrong: tokenizer_config.json" in err or "still wrong: chat_template.jinja" in err
    code, out, _ = run(capsys, source)
    assert (code, out) == (3, f"{source}: no repairable fault\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not readable as JSON"),
        (lambda f: write_json(f / "added_tokens.json", {"<|im_end|>": 7}), "belong to different models"),
        (
            lambda f: write_json(f / "config.json", {**CONFIG, "vocab_size": 260}),
            "the model's vocabulary has",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_and_nothing_is_written(source, capsys, change, message):
    change(source)
    before = contents(source)
    code, out, err = run(capsys, source)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert contents(source) == before


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run(capsys, tmp_path / "none", "--check")[0] == 1


def test_an_output_of_the_converter_is_sound(quantized, capsys):
    assert run(capsys, quantized, "--check")[0] == 0
    assert run(capsys, quantized) == (0, f"{quantized}: nothing to repair\n", "")


def says_then_ends_its_turn(model, words=3):
    """Make a model say `words` tokens, then <|im_end|>, then go on as if nothing had happened."""
    calls = []

    def hook(module, arguments, logits):
        calls.append(1)
        wanted = IM_END if len(calls) == words + 1 else 65 + len(calls)
        return torch.full_like(logits, -1e4).index_fill_(-1, torch.tensor([wanted]), 1e4)

    model.lm_head.register_forward_hook(hook)
    return model


def from_pretrained(folder):
    assert dbrx_quant.runtime.load_model
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [dbrx_quant.runtime.load_model, from_pretrained])
def test_generation_stops_where_the_turn_ends(load, quantized):
    model = says_then_ends_its_turn(load(quantized))
    prompt = torch.tensor([[ADDED["<|im_start|>"], 65]])
    made = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert made[0, 2:].tolist() == [66, 67, 68, IM_END]


def test_a_folder_that_never_ended_its_turns_does_after_the_repair(quantized, tmp_path, capsys):
    """As exllamav2 leaves DBRX: the eos of texts alone."""
    folder = tmp_path / "old"
    folder.mkdir()
    for path in quantized.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [257]})
    write_json(folder / "tokenizer.json", tokenizer_json())
    (folder / "added_tokens.json").unlink()
    prompt = torch.tensor([[ADDED["<|im_start|>"], 65]])
    endless = says_then_ends_its_turn(from_pretrained(folder)).generate(prompt, max_new_tokens=8)
    assert endless.shape[1] == 2 + 8
    ended = says_then_ends_its_turn(dbrx_quant.runtime.load_model(folder)).generate(prompt, max_new_tokens=8)
    assert ended[0, 2:].tolist() == [66, 67, 68, IM_END], "ours looks at the tokenizer's files as well"
    assert run(capsys, folder)[0] == 0
    ended = says_then_ends_its_turn(from_pretrained(folder)).generate(prompt, max_new_tokens=8)
    assert ended[0, 2:].tolist() == [66, 67, 68, IM_END]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>") == IM_END
    assert len(ADDED) + 256 < VOCABULARY
