"""The documentation keeps its word: links lead somewhere, the command takes the commands that are shown."""

import re
from urllib.parse import unquote

import pytest
from command_lines import command_lines, parse_fault
from places import ROOT

from dbrx_quant.scripts.cli.main import VERBS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href|srcset)=\"([^\"]+)\"")
ELSEWHERE = re.compile(r"[a-z]+:|\.\./\.\./actions/")  # other sites; GitHub's own pages of the repository
SPAN = re.compile(r"(?<!`)`(dbrx-quant [^`]+)`(?!`)")
NAMES = [verb.name for verb in VERBS]
SHELL = ("sh", "bash", "shell", "console", "zsh", "fish")


def without_code(text):
    """A page without its code blocks and spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def links(text):
    """Targets of links and pictures outside of code."""
    return [first or second for first, second in LINK.findall(without_code(text))]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return found


def link_fault(page, target):
    """What is wrong with a relative link, None where it leads somewhere; others are not looked at."""
    if ELSEWHERE.match(target):
        return None
    path, _, anchor = unquote(target).partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
        return f"{target}: no such heading"
    return None


def commands(text):
    """Argument lists of the commands in shell blocks and in code spans; a bare name of a verb is none."""
    found = [line for kind, code in FENCE.findall(text) if kind in SHELL for line in command_lines(code)]
    spans = [line for span in SPAN.findall(FENCE.sub("", text)) for line in command_lines(span)]
    return found + [line for line in spans if line[0] != "VERB" and (len(line) > 1 or line[0] not in NAMES)]


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert [fault for target in links(text) if (fault := link_fault(page, target))] == []


@each_page
def test_commands_parse(page, capsys):
    text = page.read_text(encoding="utf-8")
    faults = [(line, parse_fault(line, capsys)) for line in commands(text)]
    assert [fault for fault in faults if fault[1]] == []


@each_page
def test_pictures_are_small_and_described(page):
    for words, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if ELSEWHERE.match(target):
            continue
        assert (page.parent / target).stat().st_size < 150_000
        assert len(words) > 20, f"{target}: say in words what is to be seen"


def test_the_checks_see_faults(tmp_path, capsys):
    page = PAGES[0]
    assert link_fault(page, "docs/nothing.md") == "docs/nothing.md: no such file"
    assert link_fault(page, "#nothing") == "#nothing: no such heading"
    assert link_fault(page, "https://example.org/#x") is None
    assert anchors("# One & two `x`\n## A\n```\n# code\n```\n## A\n") == ["one--two-x", "a", "a-1"]
    assert links('[a](b.md#c) `[d](e)` ![f](g.png "h") <img src="i.png">') == ["b.md#c", "g.png", "i.png"]
    shown = "```sh\ndbrx-quant inspect\n```\n"
    shown += "`dbrx-quant VERB --help` `dbrx-quant doctor` `dbrx-quant convert a` `dbrx-quant go`"
    assert commands(shown) == [["inspect"], ["convert", "a"], ["go"]]
    assert all(parse_fault(line, capsys) for line in commands(shown))
