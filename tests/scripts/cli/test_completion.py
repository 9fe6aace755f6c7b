"""The completion scripts, asked for completions by the shells themselves."""

import json
import shutil
import subprocess

import pytest

from dbrx_quant.scripts.cli.completion import SHELLS, completion_script
from dbrx_quant.scripts.cli.main import VERBS, main, make_parser

ASKED = [  # what is typed, with the word to complete last
    (["con"], {"convert"}),
    ([""], {verb.name for verb in VERBS}),
    (["convert", "model", "out", "--effort", ""], {"fast", "default", "best"}),
    (["convert", "model", "out", "--max-m"], {"--max-memory"}),
    (["inspect", "fold"], {"folder"}),
    (["eval", "folder", "--text", "fil"], {"file.txt"}),
    (["completion", "z"], {"zsh"}),
]

BASH = """
source "$1"
shift
complete -p dbrx-quant > /dev/null || exit 1
COMP_WORDS=(dbrx-quant "$@") COMP_CWORD=$#
$(complete -p dbrx-quant | sed 's/.* -F \\([^ ]*\\) .*/\\1/') dbrx-quant "${@: -1}" "${COMP_WORDS[$#-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'dbrx-quant() print "GOT: $*"'
zpty -w shell 'fpath=($PWD $fpath); autoload -U compinit; compinit -D -u; print REA""DY'
zpty -r shell out '*READY*'
zpty -n -w shell $'dbrx-quant convert model out --effort fa\\t; print DO""NE\\n'
zpty -r shell out '*DONE*'
print -r -- "$out"
"""


def shell(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def folder(tmp_path):
    """What there is to complete names of files from, and the scripts."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    for name in SHELLS:
        (tmp_path / f"script.{name}").write_text(completion_script(make_parser(), name))
    return tmp_path


def ask(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("words", "expected"), ASKED, ids=lambda value: " ".join(sorted(value)))
def test_bash_completes(words, expected, folder):
    out = ask(folder, shell("bash"), "--norc", "-c", BASH, "bash", "script.bash", *words)
    assert set(out.split()) == expected


@pytest.mark.parametrize(("words", "expected"), ASKED, ids=lambda value: " ".join(sorted(value)))
def test_fish_completes(words, expected, folder):
    line = " ".join(["dbrx-quant", *words])
    code = f"source script.fish; complete -C '{line}'"
    out = ask(folder, shell("fish"), "--no-config", "-c", code)
    assert {row.split("\t")[0].rstrip("/") for row in out.splitlines()} == expected


def test_zsh_completes(folder):
    (folder / "script.zsh").rename(folder / "_dbrx-quant")
    assert "GOT: convert model out --effort fast" in ask(folder, shell("zsh"), "-f", "-c", ZSH)


def test_json_holds_the_script(capsys):
    assert main(["completion", "bash", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "shell": "bash",
        "script": completion_script(make_parser(), "bash"),
    }


def test_other_shells_are_bad_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "cmd"])
    assert stop.value.code == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
