"""The pictures of docs/how-it-works.md: the page shows all that the script draws, and it still draws them."""

import re
from pathlib import Path

import pytest
from places import ROOT

from dbrx_quant.scripts import plot_how_it_works

SHOWN = set(
    re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8"))
)


def test_the_page_shows_what_the_script_draws():
    source = Path(plot_how_it_works.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'out / "([^"]+)"', source)) == SHOWN


def test_the_price_lies_between_steps_taken_and_steps_refused():
    options = [[100, 8.0, "a"], [200, 4.0, "b"], [300, 2.0, "c"], [400, 1.0, "d"]]  # gains 0.04, 0.02, 0.01
    measurement = {"linears": {"x": {"options": options}, "y": {"options": options}}}
    strategy = {"linears": {"x": {"bits": 300}, "y": {"bits": 300}}}
    assert 0.01 < plot_how_it_works._price(measurement, strategy) < 0.02


@pytest.mark.slow
def test_the_script_draws_the_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_how_it_works.main(["--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == SHOWN
    assert all(1000 < file.stat().st_size < 150_000 for file in tmp_path.glob("*.png"))
