"""Finds the `dbrx-quant …` command lines in a text, and parses them with the command's own parser."""

import re
import shlex

from dbrx_quant.scripts.cli.main import make_parser

COMMAND = "dbrx-quant"
ENDS = ("|", "||", "&&", ";", ">", ">>", "<", "&", ")")  # shell words after which the command is over


def command_lines(text):
    """The argument lists of all commands in a shell text; continued lines are joined, comments left out."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if f"{COMMAND} " not in line:
            continue
        line = re.sub(r'"\$\(([^")]*)\)"', r"( \1 )", line)  # a command inside of quotes
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            before = words[at - 1] if at else None
            if word == COMMAND and (
                before is None or before in (*ENDS, "$") or before[-1] == "(" or "=" in before
            ):
                rest = words[at + 1 :]
                end = next((i for i, part in enumerate(rest) if part in ENDS), len(rest))
                found.append(rest[:end])
    return found


def parse_fault(arguments, capsys):
    """What the parser says against a command line; None where it takes it, asks for help included."""
    try:
        make_parser().parse_args(arguments)
    except SystemExit as stop:
        return None if stop.code == 0 else capsys.readouterr().err.splitlines()[-1]
    return None
