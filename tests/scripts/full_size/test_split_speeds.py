"""The predicted speeds of DBRX over a GPU and main memory: right by hand, and in the guide as printed."""

import json

import pytest
from places import DOCS

from dbrx_quant.scripts.dev.dbrx_sizes import dbrx
from dbrx_quant.scripts.full_size import split_speeds

D, F, KV, BLOCKS, VOCABULARY = 6144, 10752, 8 * 128, 40, 100352


@pytest.fixture
def figures(capsys):
    assert split_speeds.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_token_of_the_cpu_alone_reads_attention_four_experts_and_the_head(figures):
    attention = (2 * D * D + 2 * D * KV) * 3 / 8 + 2 * (2 * D + 16 * D)
    read = BLOCKS * (attention + 4 * 3 * D * F * 3 / 8) + VOCABULARY * D * 6.35 / 8
    assert figures["bytes_per_token"] == pytest.approx(read, rel=1e-3)
    assert figures["cpu_alone"][0] == pytest.approx(0.8 * 50e9 / read, rel=1e-3)


def test_the_time_of_a_token_by_hand():
    parts = split_speeds.Parts(attention=8e6, expert=4e6, head=16e6)
    whole = split_speeds.token_seconds(parts, 10, 2, 1.0, 1e9, 1e8)
    assert whole == pytest.approx((10 * (8e6 + 2 * 4e6) + 16e6) / 0.8e9)
    none = split_speeds.token_seconds(parts, 10, 2, 0.0, 1e9, 1e8)
    assert none == pytest.approx(10 * (8e6 / 0.8e9 + 8e6 / 0.8e8 + 50e-6) + 16e6 / 0.8e9)
    half = split_speeds.token_seconds(parts, 10, 2, 0.5, 1e9, 1e8, python=1e-3)
    experts = 0.25 * 8e6 / 0.8e9 + 0.5 * (4e6 / 0.8e8 + 50e-6) + 0.25 * (8e6 / 0.8e8 + 50e-6)
    assert half == pytest.approx(10 * (8e6 / 0.8e9 + 1e-3 + experts) + 16e6 / 0.8e9)


def test_more_memory_more_bandwidth_and_busier_experts_are_faster(figures):
    rows = figures["rows"]
    for row in rows:
        for kind in ("alike", "small DBRX", "steep"):
            speeds = [one[kind] for one in row["tokens_per_second"]]
            assert speeds == sorted(speeds)
        for one in row["tokens_per_second"][:3]:  # the slower side is the host's
            assert list(one.values()) == sorted(one.values())
    assert [row["held"]["alike"][0] for row in rows] == sorted(row["held"]["alike"][0] for row in rows)


def test_the_steep_use_is_of_four_experts_a_token():
    use = split_speeds.steep_use(16, 4)
    assert sum(use) == pytest.approx(4)
    assert list(use) == sorted(use)
    assert all(sum(own) == pytest.approx(4) for own in split_speeds.uses(4, 16, 4)["small DBRX"].values())


@pytest.mark.parametrize("python", ["0", "1"])
def test_the_guide_shows_the_tables_as_they_are_printed(python, capsys):
    split_speeds.main(["--python-ms", python])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    guide = (DOCS / "dbrx.md").read_text(encoding="utf-8")
    assert len(rows) == 7
    assert [row for row in rows if row not in guide] == []
    assert dbrx().blocks[0].experts.count == 16
