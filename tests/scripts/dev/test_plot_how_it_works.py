"""The pictures of docs/how-it-works.md: the page shows all that the script draws, and it still draws them."""

import re
from pathlib import Path

import pytest
from measurements import linear, measurement
from places import DOCS

from dbrx_quant.quantize.budget.strategy import Strategy
from dbrx_quant.scripts.dev import plot_how_it_works

PAGE = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
SHOWN = set(re.findall(r"!\[[^\]]*\]\(pictures/([^)]+)\)", PAGE))


def test_the_page_shows_what_the_script_draws():
    source = Path(plot_how_it_works.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'out / "([^"]+)"', source)) == SHOWN


def test_the_price_lies_between_steps_taken_and_steps_refused():
    options = [(100, 8.0, "a"), (200, 4.0, "b"), (300, 2.0, "c"), (400, 1.0, "d")]  # gains 0.04, 0.02, 0.01
    measured = measurement({name: linear((8, 16), options) for name in "xy"})
    chosen = {name: measured.linears[name].options[2] for name in "xy"}
    assert 0.01 < plot_how_it_works._price(measured, Strategy(3.0, 3.0, 4.0, chosen)) < 0.02


@pytest.mark.slow
def test_the_script_draws_the_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_how_it_works.main(["--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == SHOWN
    assert all(1000 < file.stat().st_size < 150_000 for file in tmp_path.glob("*.png"))
