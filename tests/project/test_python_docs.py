"""The Python snippets of the documentation, run as a reader would: one after the other, in one session."""

import re

import pytest
from places import ROOT

from dbrx_quant.runtime.kernels.activations import use_activations

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page):
    """(line, code) of every Python block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


def run_page(page):
    """The names that a page's snippets leave behind; errors point to the lines of the page."""
    names = {}
    for line, code in snippets(page):
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)
    return names


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the checkout's test data in it, where results may be written."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.mark.usefixtures("one_thread")
def test_the_python_page_and_then_the_readme_run(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    with use_activations("int8"):  # as it is for a reader
        names = run_page("docs/python.md")
    assert [result.folder.name for result in names["results"]] == ["2.5bpw", "3.0bpw"]
    assert names["weight"].shape == (128, 256)
    assert (names["exact"] - names["usual"]).abs().max() > 0
    assert "2.5bpw" in capsys.readouterr().out
    assert snippets("README.md")
    run_page("README.md")  # it uses a folder that the page has made
