"""The curve of one linear: what it promises is what the solver delivers."""

from itertools import pairwise

import pytest
import torch

from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage
from dbrx_quant.quantize.budget import curve as drawing
from dbrx_quant.quantize.budget.curve import draw, feedback_factors
from dbrx_quant.quantize.solve.ldlq import quantize_matrix
from dbrx_quant.quantize.solve.prepare import energy, prepare, spread_columns
from dbrx_quant.quantize.solve.shrinkage import DAMPINGS, UNCHOSEN, choose_shrinkage
from dbrx_quant.runtime.exl2.format import WIDTHS, Group, check_groups, padded_columns, storage_bits
from dbrx_quant.runtime.exl2.group_text import render_groups
from oracles_solver import damped, strong_hessian, weights


def problem(k, n, seed, decay=0.9):
    """A weight [N, K], its Hessian with channels in no order, and column weights."""
    generator = torch.Generator().manual_seed(seed)
    matrix = damped(strong_hessian(k, 8 * k, generator, decay), 0.01)
    shuffle = torch.randperm(k, generator=generator)
    matrix = matrix[shuffle][:, shuffle].contiguous()
    return weights(k, n, generator).T.contiguous(), matrix, 0.5 + torch.rand(n, generator=generator)


def drawn(k, n, seed, decay=0.9):
    weight, matrix, columns = problem(k, n, seed, decay)
    whole = energy(weight, matrix)
    prepared = prepare(matrix.clone())
    feedback = feedback_factors(weight, prepared, columns)
    return weight, matrix, columns, prepared, draw(weight, prepared, columns, whole, feedback)


def real_error(weight, matrix, columns, prepared, groups):
    """tr(D E^T H E) computed from the dequantized weight, in float64 and in the original order."""
    ordered = weight.T[prepared.permutation].contiguous()
    solved = quantize_matrix(ordered, prepared.factor, groups)
    restored = torch.empty_like(ordered)
    restored[prepared.permutation] = solved.dequantized.float()
    error = (weight.T - restored).double()
    return float(((matrix.double() @ error) * error * columns.double()).sum())


def test_channels_are_ordered_by_falling_variance_and_factorised_in_that_order():
    _, matrix, _ = problem(96, 32, 0)
    prepared = prepare(matrix.clone())
    order = prepared.permutation
    assert (matrix.diagonal()[order].diff() <= 0).all()
    u = prepared.factor.unit_upper
    torch.testing.assert_close(
        (u * prepared.factor.pivots) @ u.T, matrix[order][:, order], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("k", "n"), [(32, 32), (96, 40), (256, 96), (160, 64)])
def test_options_gain_error_for_bits_and_are_legal_maps_of_their_size(k, n):
    *_, curve = drawn(k, n, 1)
    bits, errors = ([getattr(option, part) for option in curve.options] for part in ("bits", "error"))
    assert len(curve.options) >= 6
    assert all(a < b for a, b in pairwise(bits))
    assert all(a > b > 0 for a, b in pairwise(errors))
    slopes = [(a.error - b.error) / (b.bits - a.bits) for a, b in pairwise(curve.options)]
    assert slopes == sorted(slopes, reverse=True), "convex"
    for option in curve.options:
        check_groups(option.group_map, k)
        assert option.bits == storage_bits(option.group_map, (k, padded_columns(n)))
    assert errors[0] < curve.energy, "two bits are better than none"


@pytest.mark.parametrize(("decay", "seed"), [(0.0, 2), (0.6, 3), (0.9, 4), (1.2, 5)])
def test_the_predicted_error_is_the_real_one_within_a_quarter(decay, seed):
    weight, matrix, columns, prepared, curve = drawn(256, 160, seed, decay)
    picked = curve.options[:: max(1, len(curve.options) // 6)]
    ratios = {
        option.groups: option.error / real_error(weight, matrix, columns, prepared, option.group_map)
        for option in picked
    }
    outside = {text: round(ratio, 3) for text, ratio in ratios.items() if not 0.8 < ratio < 1.25}
    assert not outside, ratios


def test_sampled_columns_stand_for_all(monkeypatch):
    weight, matrix, columns = problem(128, 640, 6)
    curves = []
    for count in (640, 160):
        monkeypatch.setattr(drawing, "SAMPLE_COLUMNS", count)
        curves.append(draw(weight, prepare(matrix.clone()), columns, 1.0, [1.0] * len(WIDTHS)))
    whole, sampled = ([(o.bits, o.error) for o in curve.options] for curve in curves)
    for bits, error in sampled:
        near = min(whole, key=lambda option: abs(option[0] - bits))
        if abs(near[0] - bits) < 0.005 * bits:
            assert error == pytest.approx(near[1], rel=0.15)
    assert spread_columns(640, 160)[[0, -1]].tolist() == [0, 639]
    assert len(spread_columns(640, 160).unique()) == 160
    assert spread_columns(5, 160).tolist() == [0, 1, 2, 3, 4]


def test_the_energy_is_what_dropping_the_weight_costs():
    weight, matrix, _ = problem(64, 24, 7)
    exact = torch.einsum("nk,kj,nj->", weight.double(), matrix.double(), weight.double())
    assert energy(weight, matrix) == pytest.approx(float(exact), rel=1e-5)


def test_a_weight_of_zeros_has_a_curve():
    _, matrix, columns = problem(64, 32, 8)
    zeros, prepared = torch.zeros(32, 64), prepare(matrix)
    feedback = feedback_factors(zeros, prepared, columns)
    assert feedback == (1.0,) * len(WIDTHS)
    curve = draw(zeros, prepared, columns, 0.0, feedback)
    assert curve.options
    assert curve.options[0].error == 0
    check_groups(curve.options[0].group_map, 64)


def moments(tokens, k, seed, prior=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(k, k, generator=generator) / k**0.5
    basis *= torch.arange(1.0, k + 1) ** -0.9
    split = SplitMoments.zero(k, prior=prior > 0)
    x = torch.randn(tokens, k, generator=generator) @ basis.T
    split.add(x, torch.arange(tokens) // 4)
    if prior:
        split.prior.add(torch.randn(prior, k, generator=generator) @ basis.T)
    return split


def test_the_chosen_shrinkage_is_the_best_of_its_dimension_on_selection_tokens():
    weight, _, _ = problem(64, 48, 9)
    few, many = (choose_shrinkage(weight, moments(count, 64, 10)) for count in (768, 65536))
    assert few.damping in DAMPINGS
    assert few.prior == many.prior == 0
    assert many.damping <= few.damping, "more tokens need less"


def test_too_few_selection_tokens_get_the_cautious_shrinkage():
    weight, _, _ = problem(64, 48, 9)
    assert choose_shrinkage(weight, moments(100, 64, 11)) == UNCHOSEN
    assert isinstance(UNCHOSEN, Shrinkage)


def test_a_prior_of_the_same_distribution_is_used_by_an_expert_with_few_tokens():
    weight, _, _ = problem(64, 48, 9)
    assert choose_shrinkage(weight, moments(520, 64, 13, prior=8192)).prior > 0


def test_maps_of_the_cheapest_option_have_the_least_overhead():
    *_, curve = drawn(160, 64, 13)
    assert curve.options[0].groups == render_groups((Group(2, 128), Group(2, 32)))
