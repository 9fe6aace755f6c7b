"""Every message that the troubleshooting page explains is one that the code can still say."""

import ast
import re
from functools import cache

import pytest
from places import CSRC, ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def texts(source):
    """The strings of a Python source, with GAP where a value is put in; joined by `+` they are one string."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) if isinstance(part, ast.Constant) else GAP for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return (text(node.left) or GAP) + (text(node.right) or GAP)
        return None

    return [found for node in ast.walk(ast.parse(source)) if (found := text(node))]


@cache
def spoken():
    """All strings of the package and of the native library, and the lines of the shell scripts."""
    found = []
    for layer in ("runtime", "calibration", "quantize", "scripts"):
        for file in (ROOT / layer).rglob("*.py"):
            found += texts(file.read_text(encoding="utf-8"))
    found += re.findall(r'return "(.*)";', (CSRC / "cpu" / "base" / "isa.cpp").read_text(encoding="utf-8"))
    for file in (ROOT / "scripts").glob("*.sh"):
        found += re.sub(r"\$\{[^}]*\}|\$\w+|\$\([^)]*\)", GAP, file.read_text(encoding="utf-8")).splitlines()
    return found


def is_spoken(message):
    """Whether one string holds all parts of a message in order, between its gaps."""
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split(GAP)), re.DOTALL)
    return any(pattern.search(text) for text in spoken())


@pytest.mark.parametrize("message", QUOTED)
def test_the_message_is_in_the_code(message):
    assert len(message.replace(GAP, "").strip(" :;")) > 15, "quote more of it, so that it can be found"
    assert is_spoken(message)


def test_the_page_explains_many_and_each_once():
    assert len(QUOTED) > 40
    assert len(set(QUOTED)) == len(QUOTED)


def test_a_message_that_nobody_says_is_seen():
    assert not is_spoken("the moon is … miles away; come back later")
    assert texts('raise E(f"{a}: no {b!r} " + ("x" if c else "y") + "z")')[0] == "…: no … …z"
