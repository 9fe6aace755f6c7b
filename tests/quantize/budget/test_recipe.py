"""Group maps as text, the best map at each price of a bit, and the convex hull of options."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_quant.quantize.budget.groups import (
    GROUP_ROWS,
    coarsest_groups,
    lower_hull,
    predicted_error,
    price_range,
    water_fill,
)
from dbrx_quant.runtime.exl2.format import WIDTHS, Group, check_groups, storage_bits
from dbrx_quant.runtime.exl2.group_text import parse_groups, render_groups

N = 96
groups_strategy = st.lists(
    st.builds(Group, st.sampled_from(WIDTHS), st.integers(1, 40).map(lambda units: 16 * units)), max_size=40
)


@given(groups_strategy)
def test_parse_inverts_render(groups):
    assert parse_groups(render_groups(groups)) == tuple(groups)


@given(groups_strategy)
def test_a_rendered_map_has_one_part_for_each_run_of_equal_groups(groups):
    parts = render_groups(groups).split()
    runs = sum(1 for i, group in enumerate(groups) if i == 0 or group != groups[i - 1])
    assert len(parts) == runs


def test_a_map_reads_as_documented():
    groups = (Group(4, 64), Group(4, 64), Group(3, 32))
    assert render_groups(groups) == "4:64x2 3:32"
    assert parse_groups("4:64x2 3:32") == groups


@pytest.mark.parametrize("text", ["4", "4:", ":32", "4:32xx2", "four:32", "4:32 3:32x2y", "4-32", "4:3:2"])
def test_text_of_another_form_is_refused_by_its_part(text):
    with pytest.raises(ValueError, match="is not of the form bits:rows"):
        parse_groups(text)


@cache
def all_maps(k):
    """Every legal map of groups of 32, 64 or 128 rows that start at multiples of their size."""

    def grow(row, bits):
        if row == k:
            yield ()
        for rows in GROUP_ROWS:
            if row % rows == 0 and row + rows <= k:
                for width in WIDTHS:
                    if width <= bits:
                        for rest in grow(row + rows, width):
                            yield (Group(width, rows), *rest)

    return list(grow(0, WIDTHS[0]))


def random_tables(k, seed, ordered):
    """Errors of groups: falling with bits and rising with rows as real ones do, or of no order at all."""
    random = np.random.default_rng(seed)
    if not ordered:
        return {rows: random.exponential(1.0, (6, -(-k // rows))) for rows in GROUP_ROWS if rows <= k}
    tables = {32: random.exponential(1.0, k // 32) * 4.0 ** -np.array(WIDTHS, float)[:, None]}
    tables[32] *= random.uniform(0.8, 1.2, tables[32].shape)
    for rows in GROUP_ROWS[1:]:
        if rows <= k:
            half = tables[rows // 2]
            half = np.pad(half, ((0, 0), (0, half.shape[1] % 2)))
            tables[rows] = (half[:, ::2] + half[:, 1::2]) * random.uniform(1.0, 1.6, (6, half.shape[1] // 2))
    return tables


@pytest.mark.parametrize("k", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("ordered", [True, False])
def test_water_filling_is_as_good_as_the_best_of_all_maps(k, ordered):
    maps = all_maps(k)
    assert len(maps) == len(set(maps)) > 5
    bits = np.array([storage_bits(groups, (k, N)) for groups in maps], float)
    for seed in range(4):
        tables = random_tables(k, seed, ordered)
        errors = np.array([predicted_error(tables, groups) for groups in maps])
        prices = np.concatenate([price_range(tables, N, 12), [0.0, 1e-12, 1.0, 1e9]])
        for price, found in zip(prices, water_fill(tables, N, prices), strict=True):
            check_groups(found, k)
            best = (errors + price * bits).min()
            ours = predicted_error(tables, found) + price * storage_bits(found, (k, N))
            assert ours == pytest.approx(best, rel=1e-12), (seed, price, render_groups(found))


def test_the_error_of_a_map_is_the_sum_of_its_groups_in_the_tables():
    tables = random_tables(160, 0, True)
    groups = parse_groups("8:64 8:32 4:32 2:32")
    at = {width: i for i, width in enumerate(WIDTHS)}
    by_hand = tables[64][at[8], 0] + tables[32][at[8], 2] + tables[32][at[4], 3] + tables[32][at[2], 4]
    assert predicted_error(tables, groups) == pytest.approx(by_hand)


@pytest.mark.parametrize("k", [96, 128, 160, 384])
def test_the_prices_span_from_the_fewest_bits_to_the_most(k):
    for seed in range(5):
        tables = random_tables(k, seed, True)
        prices = price_range(tables, N, 64)
        assert (np.diff(prices) < 0).all()
        maps = water_fill(tables, N, prices)
        bits = [storage_bits(groups, (k, N)) for groups in maps]
        assert bits == sorted(bits)
        assert {group.bits for group in maps[0]} == {2}
        assert {group.bits for group in maps[-1]} == {8}
        assert maps[0] == coarsest_groups(k, 2), "the first price leaves the least overhead too"


@pytest.mark.parametrize("k", [32, 64, 96, 128, 160])
def test_no_map_takes_fewer_bits_than_the_coarsest_groups_at_two_bits(k):
    fewest = min(storage_bits(groups, (k, N)) for groups in all_maps(k))
    assert storage_bits(coarsest_groups(k, 2), (k, N)) == fewest
    assert coarsest_groups(k, 2) in all_maps(k)


def test_tables_without_gains_have_one_price():
    assert len(price_range({32: np.zeros((6, 4))}, N, 64)) == 1


def slow_hull(points):
    """Points (bits, error) that some price makes the one cheapest choice, in exact arithmetic."""
    kept = set()
    for bits, error in set(points):
        others = [p for p in set(points) if p != (bits, error)]
        if any(b <= bits and e <= error for b, e in others):
            continue
        left = [p for p in others if p[0] < bits and p[1] > error]
        right = [p for p in others if p[0] > bits and p[1] < error]
        above = any(
            Fraction(b1 - bits, b1 - b0) * e0 + Fraction(bits - b0, b1 - b0) * e1 <= error
            for b0, e0 in left
            for b1, e1 in right
        )
        if not above:
            kept.add((bits, error))
    return sorted(kept)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=14))
def test_the_lower_hull_is_that_of_the_slow_oracle(points):
    found = [points[i] for i in lower_hull(points)]
    assert found == slow_hull(points)
