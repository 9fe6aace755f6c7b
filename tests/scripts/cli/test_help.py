"""The help of every verb: one line about it, and an example that the parser takes."""

import shlex

import pytest
from command_lines import command_lines, parse_fault

from dbrx_quant.scripts.cli.main import VERBS, make_parser

NAMES = [verb.name for verb in VERBS]
each_verb = pytest.mark.parametrize("verb", VERBS, ids=NAMES)


def help_of(name, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([name, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_verbs_have_names_of_their_own():
    assert len(set(NAMES)) == len(NAMES)


@each_verb
def test_help_shows_an_example_of_this_verb_that_parses(verb, capsys):
    shown = help_of(verb.name, capsys).split("example:\n")[1]
    commands = command_lines(shown)
    assert commands
    for arguments in commands:
        assert arguments[0] == verb.name
        assert parse_fault(arguments, capsys) is None, shlex.join(arguments)


@each_verb
def test_every_argument_is_explained(verb, capsys):
    parser = make_parser()
    actions = [a for a in parser._actions if a.choices and verb.name in a.choices]
    verb_parser = actions[0].choices[verb.name]
    assert [action.dest for action in verb_parser._actions if not action.help] == []
    assert {"--json", "--debug"} <= {o for action in verb_parser._actions for o in action.option_strings}


@each_verb
def test_help_fits_a_terminal(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    usage, _, _ = help_of(verb.name, capsys).partition("example:")
    assert max(map(len, usage.splitlines())) <= 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dbrx-quant doctor --json | jq .", [["doctor", "--json"]]),
        ("A=1 dbrx-quant inspect out  # comment", [["inspect", "out"]]),
        (
            "dbrx-quant eval a \\\n    --text b && dbrx-quant verify c",
            [["eval", "a", "--text", "b"], ["verify", "c"]],
        ),
        ('eval "x"\n$ dbrx-quant generate d "two words" > file', [["generate", "d", "two words"]]),
        ("source <(dbrx-quant completion bash)", [["completion", "bash"]]),
        ('eval "$(dbrx-quant completion bash)"', [["completion", "bash"]]),
        ("the command dbrx-quant is", []),
    ],
)
def test_commands_are_found_in_shell_text(text, expected):
    assert command_lines(text) == expected


def test_a_command_that_does_not_parse_is_seen(capsys):
    assert "invalid choice" in parse_fault(["frobnicate"], capsys)
    assert "unrecognized arguments: --speed" in parse_fault(["doctor", "--speed"], capsys)
    assert parse_fault(["convert", "--help"], capsys) is None
