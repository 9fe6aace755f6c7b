"""Quantization of one linear: against fp64 maths, plain torch, exllamav2's scale rule and its files."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import oracles_solver as oracle
from dbrx_quant.quantize.solve.grid import search_group
from dbrx_quant.quantize.solve.ldlq import EFFORTS, Factor, factorize, quantize_matrix
from dbrx_quant.runtime.exl2.format import (
    Group,
    UnpackedLinear,
    dequantize_linear,
    pack_linear,
    uniform_groups,
    unpack_linear,
)
from dbrx_quant.runtime.library import _native

MIXED = (Group(8, 32), Group(6, 32), Group(5, 64), Group(4, 32), Group(3, 96), Group(2, 128), Group(2, 16))
FIELDS = ("codes", "scale_codes", "scale_max", "dequantized", "loss_per_column")

pytestmark = pytest.mark.usefixtures("one_thread")  # for the oracles


def problem(k, n, seed=0, damping=0.02):
    generator = torch.Generator().manual_seed(seed)
    hessian = oracle.damped(oracle.strong_hessian(k, 2 * k, generator), damping)
    return oracle.weights(k, n, generator), hessian


def trace(error, hessian):
    error = error.double()
    return float((error * (hessian.double() @ error)).sum())


def same(found, expected):
    for field in FIELDS:
        a, b = getattr(found, field), getattr(expected, field)
        different = (a != b).nonzero().tolist()
        assert not different, f"{field}{different[0]}: {a[tuple(different[0])]} != {b[tuple(different[0])]}"


@pytest.mark.parametrize("k", [1, 31, 128, 129, 300])
def test_the_factor_multiplies_back_to_the_hessian(k):
    _, hessian = problem(k, 1)
    before = hessian.clone()
    factor = factorize(hessian)
    assert torch.equal(hessian, before)
    upper = factor.unit_upper.double()
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(), torch.ones(k).double())
    product = (upper * factor.pivots.double()) @ upper.T
    scale = hessian.diagonal().double().sqrt()
    assert ((product - hessian).abs() / (scale[:, None] * scale)).max() < 1e-5
    in_place = factorize(hessian, overwrite=True)
    assert in_place.unit_upper.data_ptr() == hessian.data_ptr()
    assert torch.equal(in_place.unit_upper, factor.unit_upper)


@pytest.mark.parametrize("row", [0, 70, 127, 128, 199])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_pivot_that_is_not_positive_is_named(row, value):
    hessian = torch.eye(200)
    hessian[row, row] = value
    with pytest.raises(ValueError, match=f"pivot of row {row} "):
        factorize(hessian)


def test_a_hessian_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="square"):
        factorize(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        *[(uniform_groups(96, bits, 32), 40) for bits in (2, 3, 4, 5, 6, 8)],
        (uniform_groups(288, 3, 128), 96),
        (uniform_groups(32, 4, 32), 1),
        (MIXED, 72),
    ],
)
def test_native_gives_the_same_bits_on_every_instruction_set_as_torch(groups, n):
    weight, hessian = problem(sum(group.rows for group in groups), n)
    weight[:, n // 2] = 0
    factor = factorize(hessian)
    columns = torch.rand(n, generator=torch.Generator().manual_seed(5))
    expected = quantize_matrix(weight, factor, groups, columns, backend="torch")
    for found in oracle.on_every_instruction_set(lambda: quantize_matrix(weight, factor, groups, columns)):
        same(found, expected)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_overwriting_the_weight_changes_nothing_but_what_is_kept(backend):
    weight, hessian = problem(sum(group.rows for group in MIXED), 40)
    factor, given = factorize(hessian), weight.clone()
    expected = quantize_matrix(weight, factor, MIXED, backend=backend)
    assert torch.equal(weight, given)
    found = quantize_matrix(given, factor, MIXED, backend=backend, overwrite=True)
    assert torch.equal(given, weight - expected.dequantized.float()), "the errors"
    assert found.dequantized.shape == (0, 40)
    same(dataclasses.replace(found, dequantized=expected.dequantized), expected)


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_native_gives_the_same_bits_as_torch_at_every_effort(effort):
    weight, hessian = problem(sum(group.rows for group in MIXED), 40)
    factor = factorize(hessian)
    expected = quantize_matrix(weight, factor, MIXED, backend="torch", effort=effort)
    for found in oracle.on_every_instruction_set(
        lambda: quantize_matrix(weight, factor, MIXED, effort=effort)
    ):
        same(found, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_effort_finds_less_loss(bits):
    weight, hessian = problem(256, 64)
    groups, factor = uniform_groups(256, bits, 64), factorize(hessian)
    fast, default, best = (quantize_matrix(weight, factor, groups, effort=effort).loss for effort in EFFORTS)
    assert best < default < fast


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 3e5])
def test_native_equals_torch_at_the_ends_of_half_precision(size):
    weight, hessian = problem(96, 40)
    factor = factorize(hessian)
    groups = (Group(4, 32), Group(2, 64))
    found = quantize_matrix(weight * size, factor, groups)
    same(found, quantize_matrix(weight * size, factor, groups, backend="torch"))
    assert torch.isfinite(found.dequantized).all()


def test_results_do_not_depend_on_the_number_of_threads():
    weight, hessian = problem(464, 200)
    factor = factorize(hessian)
    groups = uniform_groups(464, 2, 32)
    expected = quantize_matrix(weight, factor, groups)
    try:
        for threads in (1, 2, 5):
            _native.set_threads(threads)
            same(quantize_matrix(weight, factor, groups), expected)
    finally:
        _native.set_threads(0)


@pytest.mark.parametrize("groups", [MIXED, uniform_groups(400, 2, 128), uniform_groups(384, 8, 32)])
def test_loss_is_the_trace_of_the_errors_in_the_hessian(groups):
    weight, hessian = problem(sum(group.rows for group in groups), 64)
    solved = quantize_matrix(weight, factorize(hessian), groups)
    error = weight - solved.dequantized.float()
    assert solved.loss == pytest.approx(trace(error, hessian), rel=1e-3)
    columns = (error.double() * (hessian.double() @ error.double())).sum(0)
    torch.testing.assert_close(solved.loss_per_column, columns, rtol=1e-2, atol=0)


def test_every_row_is_rounded_to_one_of_the_two_grid_values_next_to_its_target():
    weight, hessian = problem(400, 64)
    factor = factorize(hessian)
    solved = quantize_matrix(weight, factor, MIXED)
    value = solved.dequantized.double().numpy()
    error = weight.double().numpy() - value
    target = weight.double().numpy() + factor.unit_upper.double().triu(1).numpy().T @ error
    start = 0
    for g, group in enumerate(MIXED):
        rows = slice(start, start + group.rows)
        scale = oracle.stored_scales(solved.scale_max[g].item(), solved.scale_codes[g].numpy())
        nearest = np.abs(target[rows] - oracle.nearest(target[rows], scale, group.bits))
        # Halves keep eleven bits of the value; targets are summed in fp32.
        slack = 1e-3 * np.abs(value[rows]) + 1e-3 * scale + 1e-5 * np.abs(target[rows])
        assert (np.abs(target[rows] - value[rows]) <= np.maximum(nearest, scale) + slack).all()
        start += group.rows


def test_feedback_helps():
    weight, hessian = problem(256, 64)
    factor = factorize(hessian)
    groups = uniform_groups(256, 3, 32)
    solved = quantize_matrix(weight, factor, groups)
    plain = quantize_matrix(weight, Factor(torch.eye(256), factor.pivots), groups)
    assert solved.loss < 0.8 * trace(weight - plain.dequantized.float(), hessian)


@pytest.mark.parametrize(("bits", "margin"), [(2, 0.07), (3, 0.05), (4, 0.05), (8, 0.05)])
def test_several_paths_have_less_loss_than_the_nearest_values_alone(bits, margin):
    """On the same scales, for activations that are correlated as much as those of trained models."""
    generator = torch.Generator().manual_seed(0)
    hessian = oracle.strong_hessian(256, 1024, generator, decay=2.0, noise=0.02, spread=0.3)
    hessian = oracle.damped(hessian, 0.02)
    weight = oracle.weights(256, 96, generator)
    factor, groups = factorize(hessian), uniform_groups(256, bits, 32)
    solved = quantize_matrix(weight, factor, groups)
    scales = iter(map(oracle.stored_scales, solved.scale_max.tolist(), solved.scale_codes.numpy()))
    doubles = (t.double().numpy() for t in (weight, factor.unit_upper, factor.pivots))
    values = oracle.ldlq(*doubles, groups, lambda *_: next(scales))
    assert solved.loss < (1 - margin) * trace(weight - torch.from_numpy(values).float(), hessian)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounded_feedback_costs_nothing_and_is_in_the_loss(bits, monkeypatch):
    generator = torch.Generator().manual_seed(bits)
    hessian = oracle.damped(oracle.strong_hessian(1024, 3000, generator, decay=2.0), 0.02)
    weight = oracle.weights(1024, 256, generator)
    factor, groups = factorize(hessian), uniform_groups(1024, bits, 32)
    exact = quantize_matrix(weight, factor, groups)
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    rounded = quantize_matrix(weight, factor, groups)
    true = trace(weight - rounded.dequantized.float(), hessian)
    assert rounded.loss == pytest.approx(float(true), rel=1e-3)
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


def exl2_scales(targets, bits, _pivots):
    return oracle.stored_scales(*oracle.exl2_search(targets, bits))


def our_scales(targets, bits, pivots):
    x, weights = torch.from_numpy(targets).float(), torch.from_numpy(pivots).float()
    scale_max, codes, _ = search_group(x, bits, weights)
    return oracle.stored_scales(scale_max.item(), codes.numpy())


@pytest.mark.parametrize(
    ("bits", "rows", "margin", "scales_margin"),
    [(2, 64, 0.2, 0.15), (3, 128, 0.2, 0.15), (4, 128, 0.12, 0.08), (6, 32, 0.05, 0.02)],
)
def test_scales_per_column_beat_the_shared_clip_factor_on_other_data(bits, rows, margin, scales_margin):
    """exllamav2's scales with plain feedback and the same damping, judged by the Hessian of other data."""
    generator = torch.Generator().manual_seed(3)
    both = oracle.strong_hessian(512, 4096, generator)
    x = torch.randn(4096, 512, generator=generator) @ torch.linalg.cholesky(both).T
    seen = oracle.damped(x.T @ x / 4096, 0.02)
    weight = oracle.weights(512, 96, generator)
    factor, groups = factorize(seen), uniform_groups(512, bits, rows)

    doubles = [t.double().numpy() for t in (weight, factor.unit_upper, factor.pivots)]
    exl2, scales = (
        trace(weight - torch.from_numpy(oracle.ldlq(*doubles, groups, search)).float(), both)
        for search in (exl2_scales, our_scales)
    )
    whole = trace(weight - quantize_matrix(weight, factor, groups).dequantized.float(), both)
    assert scales < (1 - scales_margin) * exl2
    assert whole < (1 - margin) * exl2
    assert whole < scales


def test_our_files_have_less_loss_than_exllamav2_s(golden_file):
    """Same weights, activations, damping and groups as exllamav2 had when it wrote the file."""
    golden = load_file(golden_file)
    if "x_int8" not in golden:
        pytest.skip("made without activations")
    theirs = unpack_linear(golden)
    x = golden["x_int8"].float() * golden["x_scale"]
    hessian = oracle.damped(x.T @ x, 0.12)
    order = theirs.permutation
    weight = torch.zeros_like(golden["dequant"], dtype=torch.float32)
    weight[:, : len(golden["weight"])] = golden["weight"].float().T
    dequantized = golden["dequant"].float()[order]
    weight, hessian = weight[order].contiguous(), hessian[order][:, order].contiguous()
    solved = quantize_matrix(weight, factorize(hessian), theirs.groups)
    assert solved.loss < trace(weight - dequantized, hessian)


@pytest.mark.parametrize("n", [32, 96])
def test_the_packed_result_decodes_to_what_the_solver_saw(n):
    weight, hessian = problem(400, n)
    weight[:, 3] = 0
    solved = quantize_matrix(weight, factorize(hessian), MIXED)
    permutation = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    packed = pack_linear(
        UnpackedLinear(solved.codes, solved.scale_codes, solved.scale_max, MIXED, permutation, None)
    )
    decoded = dequantize_linear(packed)  # [N, K], input channels in their own order
    assert torch.equal(decoded.T[permutation].view(torch.int16), solved.dequantized.view(torch.int16))


@pytest.mark.parametrize("bits", [2, 8])
def test_columns_of_zeros_get_the_middle_code_and_scale_code_zero(bits):
    weight, hessian = problem(64, 48)
    weight[:, 16:32] = 0
    solved = quantize_matrix(weight, factorize(hessian), uniform_groups(64, bits, 32))
    assert (solved.codes[:, 16:32] == 2 ** (bits - 1)).all()
    assert (solved.scale_codes[:, 16:32] == 0).all()
    assert not solved.loss_per_column[16:32].any()


def test_a_matrix_of_zeros_is_stored_as_zeros():
    _, hessian = problem(64, 1)
    solved = quantize_matrix(torch.zeros(64, 32), factorize(hessian), uniform_groups(64, 3, 32))
    assert not solved.scale_max.any()
    assert not solved.dequantized.any()
    assert (solved.codes == 4).all()


def test_wrong_arguments_are_refused():
    weight, hessian = problem(64, 32)
    factor = factorize(hessian)
    groups = uniform_groups(64, 3, 32)
    with pytest.raises(ValueError, match="cover 64 rows, the matrix has 32"):
        quantize_matrix(weight[:32], factor, groups)
    with pytest.raises(ValueError, match="factor is for 64"):
        quantize_matrix(weight[:32], factor, uniform_groups(32, 3, 32))
    with pytest.raises(ValueError, match="column_weights"):
        quantize_matrix(weight, factor, groups, torch.ones(31))
    with pytest.raises(ValueError, match=r"weight\[0, 0\] is nan"):
        quantize_matrix(torch.full((64, 32), float("nan")), factor, groups)
