"""An option is declared once: the command, the check of its value, the work folder and the record follow."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from dbrx_quant.quantize import options as declaring
from dbrx_quant.quantize.declared import flag, option
from dbrx_quant.quantize.options import ConvertOptions, declarations, defaults
from dbrx_quant.quantize.solve.ldlq import EFFORTS
from dbrx_quant.quantize.work_folder import Resume
from dbrx_quant.scripts.terminal.arguments import add_options, options_of


def parsed(words, *, measuring=False):
    parser = argparse.ArgumentParser()
    add_options(parser, measuring=measuring)
    return parser.parse_args(words)


def other(declared, default):
    """A value that is not the default, and the words that ask for it."""
    if declared.kind == "switch":
        return True, []
    if declared.kind == "choice":
        value = next(choice for choice in declared.choices if choice != default)
        return value, [str(value)]
    if declared.kind == "size":
        return 3_000_000_000, ["3GB"]
    if declared.kind == "whole":
        return 7, ["7"]
    return (Path("x") if declared.kind in ("file", "folder") else "x"), ["x"]


@pytest.mark.parametrize("name", [name for name, _ in declarations()])
def test_every_option_goes_from_the_command_line_to_the_record(name, tmp_path):
    declared = dict(declarations())[name]
    value, words = other(declared, defaults()[name])
    needed = ["--held-out", "text"] if name == "held_out_rows" else []
    (tmp_path / "x").write_text("contents")
    given = options_of(parsed([flag(name, declared), *words, *needed]), tmp_path / "model", tmp_path / "out")
    assert getattr(given, name) == value
    plain = options_of(parsed(needed), tmp_path / "model", tmp_path / "out")
    assert (given.settings(3.0) != plain.settings(3.0)) == (declared.changes != "nothing")
    assert (flag(name, declared) in shlex.split(given.command(3.0))) == (declared.changes != "nothing")
    if value != Path("x"):
        assert (given.work_facts() != plain.work_facts()) == (declared.changes == "everything")


def test_a_new_option_needs_no_other_place(monkeypatch, tmp_path):
    @dataclass(frozen=True)
    class More(ConvertOptions):
        prior_tokens: int = option("whole", "tokens of the prior", 2048, changes="everything", least=1)

    monkeypatch.setattr(declaring, "ConvertOptions", More)
    assert parsed(["--prior-tokens", "9"]).prior_tokens == 9
    given = More(tmp_path / "model", tmp_path / "out", prior_tokens=9)
    assert given.settings(3.0)["prior_tokens"] == 9
    assert given.work_facts()["prior_tokens"] == 9
    assert "--prior-tokens 9" in given.command(3.0)
    with pytest.raises(ValueError, match="prior_tokens: 0, expected at least 1"):
        More(tmp_path / "model", tmp_path / "out", prior_tokens=0)


def test_measuring_has_no_option_of_targets():
    names = vars(parsed([], measuring=True)).keys()
    assert "rows" in names
    assert not {"head_bits", "refit", "measurement", "max_shard_bytes"} & names


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"head_bits": 7}, "head_bits: 7, expected one of 2, 3"),
        ({"effort": "most"}, "effort: 'most', expected one of fast"),
        ({"rows": 0}, "rows: 0, expected at least 1"),
        ({"seed": -1}, "seed: -1"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: 0"),
    ],
)
def test_values_are_checked_however_they_come(change, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        ConvertOptions(tmp_path, tmp_path / "out", **change)


def test_the_choices_are_those_of_the_code():
    choices = {name: declared.choices for name, declared in declarations()}
    assert choices["effort"] == tuple(EFFORTS)
    assert choices["resume"] == get_args(Resume)
