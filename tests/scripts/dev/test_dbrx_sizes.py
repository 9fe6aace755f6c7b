"""The sizes of the real DBRX: right by hand, and in the guide as the script prints them."""

import json
import math

import pytest
from places import DOCS

from dbrx_quant.scripts.dev import dbrx_sizes

GUIDE = DOCS / "dbrx.md"
D, F, BLOCKS, EXPERTS, KV, VOCABULARY = 6144, 10752, 40, 16, 8 * 128, 100352
WEIGHTS = BLOCKS * (D * (D + 2 * KV) + D * D + EXPERTS * 3 * D * F)


@pytest.fixture(scope="module")
def figures():
    return json.loads(capture(["--json"]))


def capture(arguments):
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert dbrx_sizes.main(arguments) == 0
    return out.getvalue()


def test_weights_and_cache_are_those_of_the_published_dimensions(figures):
    assert figures["weights"] == WEIGHTS
    assert figures["cache_bytes"] == {"4096": 2 * 2 * KV * 4096 * BLOCKS, "8192": 2 * 2 * KV * 8192 * BLOCKS}


def test_a_checkpoint_is_linears_head_embedding_and_little_else(figures):
    for bpw, size in figures["bytes"].items():
        expected = float(bpw) * WEIGHTS / 8 + (6.35 / 8 + 2) * VOCABULARY * D
        assert math.isclose(size, expected, rel_tol=5e-4)  # norms, routers, headers


def test_the_most_bits_for_a_memory_just_fit(figures):
    architecture = dbrx_sizes.dbrx()
    for gib, (bpw, _) in figures["most_bpw"].items():
        memory = int(gib) * 2**30
        assert dbrx_sizes.memory_bytes(architecture, bpw, 4096) <= memory
        assert dbrx_sizes.memory_bytes(architecture, bpw + 0.01, 4096) > memory
    assert dbrx_sizes.most_bpw(architecture, 24 * 2**30, 4096) is None


def test_the_guide_shows_the_tables_as_they_are_printed():
    guide = GUIDE.read_text(encoding="utf-8")
    rows = [line for line in capture([]).splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in guide] == []
