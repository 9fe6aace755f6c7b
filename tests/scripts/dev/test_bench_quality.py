"""What the quality benchmark computes itself: comparisons, variants' allocations, exllamav2's scale rule."""

import itertools
import math

import numpy as np
import pytest
import torch
from measurements import linear
from measurements import measurement as made

from dbrx_quant.calibration.text.tokens import HELD_OUT_EVERY
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.budget.groups import GROUP_ROWS
from dbrx_quant.quantize.solve.ldlq import factorize, quantize_matrix
from dbrx_quant.runtime.exl2.format import check_groups, uniform_groups
from dbrx_quant.runtime.exl2.group_text import parse_groups
from dbrx_quant.scripts.dev import quality_variants as variants
from dbrx_quant.scripts.dev.bench_quality import read_peers, replaced
from dbrx_quant.scripts.dev.quality_report import (
    compare,
    divergence_at,
    equivalent_bits,
    interpolate,
    number,
    prediction_cells,
    size_cells,
    study_cells,
)

PEER = [{"bpw": 2.0, "kl": 1.0}, {"bpw": 3.0, "kl": 0.1}, {"bpw": 4.0, "kl": 0.01}]


def test_interpolation_goes_through_the_points_and_on_beyond_them():
    points = [(3.0, 30.0), (1.0, 10.0), (2.0, 0.0)]
    assert interpolate(points, 1.0) == (10.0, False)
    assert interpolate(points, 2.5) == (15.0, False)
    assert interpolate(points, 4.0) == (60.0, True)
    assert interpolate(points, 0.0) == (20.0, True)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]])
def test_a_line_needs_two_points_at_different_places(points):
    with pytest.raises(ValueError, match="two or more points"):
        interpolate(points, 1.0)


def test_divergence_of_a_peer_is_log_linear_in_its_bits():
    assert divergence_at(PEER, 2.5) == (pytest.approx(math.sqrt(0.1)), False)
    assert divergence_at(PEER, 5.0) == (pytest.approx(0.001), True)
    assert divergence_at(PEER, 4.001) == (pytest.approx(0.01, rel=0.01), False)


def test_equivalent_bits_are_what_a_peer_needs_more():
    bits, outside = equivalent_bits(PEER, 2.0, 0.1)
    assert (bits, outside) == (pytest.approx(1.0), False)
    bits, outside = equivalent_bits(PEER, 4.0, 0.001)
    assert (bits, outside) == (pytest.approx(1.0), True)


def test_only_i_quants_of_llama_are_a_curve_to_compare_with():
    llama = [
        {"type": "IQ2_S", **PEER[0]},
        {"type": "Q2_K", "bpw": 2.5, "kl": 9.0},
        {"type": "IQ3_S", **PEER[1]},
    ]
    found = compare({"bpw": 2.5, "kl": 0.1}, {"llamacpp": llama, "exllamav2": PEER})
    for tool in ("llamacpp", "exllamav2"):
        assert found[tool]["kl"] == pytest.approx(math.sqrt(0.1))
        assert found[tool]["ratio"] == pytest.approx(math.sqrt(0.1))
        assert found[tool]["bits"] == pytest.approx(0.5)


def test_numbers_have_four_digits():
    written = [number(value) for value in (0.37917, 0.00076123, 12.3456, 1.0, None)]
    assert written == ["0.3792", "0.0007612", "12.35", "1.000", "-"]


def test_a_study_shows_each_variant_beside_the_base():
    seconds = {"wall": 2.0, "cpu": 3.0}
    rows = [
        {"variant": v, "target": t, "kl": kl, "measure": seconds, "quantize": seconds}
        for v, t, kl in (("uniform", 3.0, 0.3), ("ours", 3.0, 0.2), ("ours", 4.0, 0.1))
    ]
    head, cells = study_cells(rows, "ours")
    assert head[:5] == ["variant", "KL at 3.0", "to ours", "KL at 4.0", "to ours"]
    assert cells[0][:5] == ["uniform", "0.3000", "1.500", "-", "-"]
    assert cells[1][:5] == ["ours", "0.2000", "1.000", "0.1000", "1.000"]


def test_what_lies_beyond_a_peer_is_marked():
    row = {"target": 5.0, "bpw": 5.0, "kl": 0.001, "kl_stderr": None, "ppl": 9.0, "top1": 0.9}
    head, (cells,) = size_cells([{**row, "predicted_kl": 0.002}], {"exllamav2": PEER})
    assert len(head) == len(cells)
    assert cells[-3:] == ["~0.001000", "1.00", "~+0.00"]
    assert cells[6:8] == ["0.002000", "2.00"]


def test_predictions_are_shown_as_means_and_for_each_part():
    pairs = [(0.02, 0.01), (0.02, 0.04)]
    rows = [{"target": 3.0, "predicted_kl": p, "unseen": {"kl": m}} for p, m in pairs]
    head, (cells,) = prediction_cells(rows)
    assert len(head) == len(cells)
    assert cells == ["3.0", "0.02000", "0.02500", "0.80", "2.00 0.50"]


def test_every_row_is_left_out_in_one_part_of_the_study_of_predictions():
    parts = [variant.setting.left_out for variant in variants.STUDIES["prediction"]]
    assert parts == list(range(HELD_OUT_EVERY))


def test_peers_of_an_unknown_model_are_refused(tmp_path):
    file = tmp_path / "peers.json"
    file.write_text('{"big-7b": {"original_ppl": 5.0, "exllamav2": []}}')
    assert read_peers(file, "big") == {"exllamav2": []}
    with pytest.raises(ValueError, match="big-7b"):
        read_peers(file, "small")


def test_patches_hold_inside_the_block_alone():
    name = f"{variants.SHRINKAGE}.DAMPINGS"
    from dbrx_quant.quantize.solve import shrinkage

    before = shrinkage.DAMPINGS
    with replaced({name: (0.5,)}):
        assert shrinkage.DAMPINGS == (0.5,)
    assert before == shrinkage.DAMPINGS


@pytest.fixture(scope="module")
def measurement():
    """Curves of 3 blocks with two matrices each, of different sizes and steepness, and a head."""
    rng = np.random.default_rng(0)
    linears = {}
    for block, role in itertools.product(range(3), ("q", "down")):
        k, n = (64, 96) if role == "q" else (128, 64)
        bits = k * n * np.linspace(2.1, 8.2, 12)
        errors = math.exp(rng.normal()) * np.exp2(-2.0 * bits / (k * n))
        options = [(int(b), float(e), f"o{i}") for i, (b, e) in enumerate(zip(bits, errors, strict=True))]
        name = f"model.layers.{block}.{role}_proj"
        linears[name] = linear((k, n), options, role, math.exp(rng.normal()))
    head = linear((64, 64), [(64 * 64 * 6, 0.01, "h")], "head")
    return made({**linears, "lm_head": head})


ALLOCATIONS = {v.name: v.allocation for study in variants.STUDIES.values() for v in study}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("target", [2.2, 3.0, 5.5])
def test_every_allocation_keeps_to_the_budget_and_is_no_better_than_ours(measurement, name, target):
    strategy = ALLOCATIONS[name](measurement, target, 6)
    linears = measurement.linears
    assert set(strategy.choices) == set(linears)
    for name, choice in strategy.choices.items():
        assert choice in linears[name].options
    bits = sum(choice.bits for name, choice in strategy.choices.items() if name != "lm_head")
    weights = 3 * (64 * 96 + 128 * 64)
    assert strategy.bpw == pytest.approx(bits / weights)
    assert bits <= target * weights
    assert strategy.kl == pytest.approx(sum(choice.error for choice in strategy.choices.values()))
    largest_step = max(a.error - b.error for e in linears.values() for a, b in itertools.pairwise(e.options))
    assert strategy.kl >= allocate(measurement, target, 6).kl - largest_step


def test_linears_that_share_a_key_share_their_level(measurement):
    strategy = variants.shared_by(lambda name, entry: variants.block_of(name))(measurement, 3.0, 6)
    levels = {}
    for name, option in strategy.choices.items():
        if name != "lm_head":
            shape = measurement.linears[name].shape
            levels.setdefault(variants.block_of(name), []).append(option.bits / math.prod(shape))
    step = (8.2 - 2.1) / 11
    assert all(max(found) - min(found) < 1.01 * step for found in levels.values())
    assert len({round(max(found), 2) for found in levels.values()}) > 1


def test_uniform_allocation_spends_its_budget_evenly(measurement):
    strategy = variants.shared_by(lambda name, entry: 0)(measurement, 3.0, 6)
    linears = {name: entry for name, entry in measurement.linears.items() if name != "lm_head"}
    widths = [strategy.choices[name].bits / math.prod(entry.shape) for name, entry in linears.items()]
    assert max(widths) - min(widths) < 1.01 * (8.2 - 2.1) / 11
    steps = [b.bits - a.bits for e in linears.values() for a, b in itertools.pairwise(e.options)]
    bits = sum(strategy.choices[name].bits for name in linears)
    assert 0 <= 3.0 * 3 * (64 * 96 + 128 * 64) - bits < max(steps)


def test_relative_errors_do_not_see_what_an_error_costs(measurement):
    dearer = {
        name: linear(e.shape, [(o.bits, 9 * o.error, o.groups) for o in e.options], e.role, 9 * e.energy)
        if "layers.1" in name
        else e
        for name, e in measurement.linears.items()
    }
    plain = variants.relative_errors(measurement, 3.0, 6)
    same = variants.relative_errors(made(dearer), 3.0, 6)
    assert {n: c.groups for n, c in plain.choices.items()} == {n: c.groups for n, c in same.choices.items()}
    assert same.kl > plain.kl


@pytest.mark.parametrize("units", [1, 3, 18])
def test_one_width_maps_are_legal_and_of_one_width(units):
    tables = {rows: np.zeros((6, 1)) for rows in GROUP_ROWS}
    tables[32] = np.zeros((6, units))
    maps = variants.one_width(tables, 64, np.ones(1))
    assert len(maps) == 6 * len(GROUP_ROWS)
    for groups in maps:
        check_groups(groups, 32 * units)
        assert len({group.bits for group in groups}) == 1


def rows_of(x, bits):
    """A group without correlations between its rows."""
    return variants.Rows(x, x.clone(), bits, torch.eye(len(x)), torch.ones(len(x)))


def scales_by_the_book(x, bits):
    """exllamav2's rule in numpy, float64, one column after the other."""
    z, q = 2 ** (bits - 1), 2**bits - 1
    base = (np.abs(x).max(0) + 1e-12) / (q / 2)
    largest = base.max()
    s = np.clip(np.round(16 * np.sqrt(base / largest)), 1, 16)
    best = None
    for i in range(97):
        p = 0.7 * (1 - i / 96) + 1.2 * (i / 96)
        error = 0.0
        for column, scale in zip(x.T, (s / 16) ** 2 * largest * p, strict=True):
            code = np.clip(np.rint(column / scale), -z, q - z)
            error += (np.abs(code * scale - column) ** 3.5).sum()
        if best is None or error < best[0]:
            best = (error, largest * p)
    return best[1], s - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exllamav2_scales_are_those_of_its_rule(bits):
    x = torch.randn(32, 24, generator=torch.Generator().manual_seed(bits)) * torch.linspace(0.1, 1.0, 24)
    maximum, codes = variants.exllamav2_scales(rows_of(x, bits))
    expected_maximum, expected_codes = scales_by_the_book(x.double().numpy(), bits)
    assert float(maximum) == pytest.approx(expected_maximum, rel=0.006)  # one step of p, for ties
    assert codes.tolist() == expected_codes.tolist()


def test_exllamav2_scales_of_a_group_of_zeros_store_nothing():
    maximum, codes = variants.exllamav2_scales(rows_of(torch.zeros(32, 8), 4))
    assert float(maximum) == 0
    assert codes.tolist() == [15] * 8


RULES = (variants.exllamav2_scales, variants.column_scales, variants.tried_scales)


@pytest.mark.parametrize("scales", RULES)
def test_one_sweep_reports_the_loss_of_what_it_stores(scales):
    generator = torch.Generator().manual_seed(1)
    k, n = 96, 32
    a = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    h = a.T @ a / len(a)
    weight = torch.randn(k, n, generator=generator)
    groups = parse_groups("4:32 3:64")
    solved = variants.one_sweep(scales)(weight, factorize(h), groups)
    error = (weight - solved.dequantized.float()).double()
    assert solved.loss == pytest.approx(float(((h.double() @ error) * error).sum()), rel=1e-4)
    assert solved.codes[32:].max() < 8
    nearest = weight - torch.round(weight / 0.6).clamp(-4, 3) * 0.6
    assert solved.loss < float(((h @ nearest) * nearest).sum())


def test_one_sweep_with_our_search_is_the_solver_at_its_least_effort():
    generator = torch.Generator().manual_seed(3)
    k, n = 128, 32
    a = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    factor, weight = factorize(a.T @ a / len(a)), torch.randn(k, n, generator=generator)
    groups = uniform_groups(k, 4, 32)
    swept = variants.one_sweep(variants.column_scales)(weight, factor, groups)
    assert swept.loss == pytest.approx(quantize_matrix(weight, factor, groups, effort="fast").loss, rel=0.01)


def test_trials_beat_both_rules_and_the_solver_beats_the_trials():
    generator = torch.Generator().manual_seed(2)
    k, n = 128, 64
    a = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    factor, groups = factorize(a.T @ a / len(a)), uniform_groups(k, 3, 64)
    weight = torch.randn(k, n, generator=generator)
    theirs, column, tried = (variants.one_sweep(scales)(weight, factor, groups).loss for scales in RULES)
    assert quantize_matrix(weight, factor, groups).loss < tried < min(theirs, column)
