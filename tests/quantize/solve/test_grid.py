"""The scale search: native against torch, against exhaustive search, and at the edges of half precision."""

import numpy as np
import pytest
import torch

import oracles_solver as oracle
from dbrx_quant.quantize.solve.grid import error_table, scale_table, search_group
from dbrx_quant.runtime.library import _native

WIDTHS = (2, 3, 4, 5, 6, 8)

pytestmark = pytest.mark.usefixtures("one_thread")  # for the oracles


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def awkward(rows, n, seed=0):
    """A group with a column of zeros, one of a single weight, an outlier column and an outlier weight."""
    x = oracle.weights(rows, n, generator(seed))
    x[:, n // 2] = 0
    x[1:, n // 3] = 0
    x[:, n - 1] *= 9
    x[0, 0] = 1.5
    return x, torch.rand(rows, generator=generator(seed + 1)) + 0.05


def same(found, expected):
    assert found[0] == expected[0], "scale_max"
    different = (found[1] != expected[1]).nonzero().flatten().tolist()
    assert not different, f"scale codes differ in columns {different[:5]}"
    assert found[2] == expected[2], "error"


def test_scale_table_makes_the_two_half_roundings_of_the_format():
    maxima = torch.arange(0, 0x7C00, 7, dtype=torch.int16).view(torch.float16)
    expected = np.stack([oracle.stored_scales(maximum, np.arange(16)) for maximum in maxima.double().numpy()])
    assert np.array_equal(scale_table(maxima).double().numpy(), expected)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "n"), [(32, 32), (16, 72), (96, 130), (33, 1)])
def test_search_gives_the_same_bits_on_every_instruction_set_as_in_torch(bits, rows, n):
    x, weights = awkward(rows, n)
    columns = torch.rand(n, generator=generator(3))
    for size in (1, 1e-5, 1e4):
        arguments = (x * size, bits, weights, columns)
        expected = search_group(*arguments, backend="torch")
        for found in oracle.on_every_instruction_set(lambda: search_group(*arguments)):  # noqa: B023, called at once
            same(found, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_is_that_of_the_scales_found(bits):
    x, weights = awkward(64, 96)
    columns = torch.rand(96, generator=generator(3))
    scale_max, codes, error = search_group(x, bits, weights, columns)
    scales = oracle.stored_scales(scale_max.item(), codes.numpy())
    expected = oracle.weighted_error(x.double().numpy(), scales, bits, weights.double().numpy())
    assert error == pytest.approx((expected * columns.double().numpy()).sum(), rel=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_search_comes_close_to_trying_everything(bits):
    x, weights = awkward(32, 64)
    columns = torch.ones(64)
    _, _, error = search_group(x, bits, weights, columns)
    least = oracle.exhaustive_search(
        x.double().numpy(), bits, weights.double().numpy(), columns.double().numpy()
    )
    assert error < 1.04 * least


def test_a_column_weight_draws_the_group_maximum_to_its_column():
    x = torch.randn(32, 64, generator=generator()) * 0.02
    x[:, 0] *= 30  # needs a maximum that leaves the others few scales
    light = torch.ones(64)
    light[0] = 1e-9
    heavy_maximum = search_group(x, 3, torch.ones(32))[0]
    light_maximum = search_group(x, 3, torch.ones(32), light)[0]
    assert light_maximum < heavy_maximum


def test_zeros_have_code_zero_and_no_maximum():
    scale_max, codes, error = search_group(torch.zeros(32, 40), 4, torch.ones(32))
    assert (scale_max.item(), int(codes.max()), error) == (0.0, 0, 0.0)
    x = torch.ones(32, 40)
    x[:, 7] = 0
    assert search_group(x, 4, torch.ones(32))[1][7] == 0


@pytest.mark.parametrize("size", [3e-7, 2e-6, 1e-5, 1e-4])
def test_tiny_groups_use_the_subnormal_scales(size):
    """half(scale_max / 256) has fewer than eleven bits at these sizes, or is 0 in the obvious choice."""
    x = torch.randn(32, 64, generator=generator()) * size
    scale_max, codes, error = search_group(x, 4, torch.ones(32))
    scales = oracle.stored_scales(scale_max.item(), codes.numpy())
    assert (scales > 0).all()
    assert error < 0.1 * float((x.double() ** 2).sum())  # the half grid itself is coarse at the smallest size


def test_huge_groups_stay_finite():
    x = torch.randn(32, 64, generator=generator()) * 20000
    scale_max, _, error = search_group(x.clamp(-65504, 65504), 2, torch.ones(32))
    assert torch.isfinite(scale_max)
    assert np.isfinite(error)
    assert torch.isfinite(search_group(torch.full((32, 8), 3e38), 8, torch.ones(32))[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    x = torch.zeros(32, 8)
    x[3, 5] = value
    with pytest.raises(ValueError, match=r"x\[3, 5\] is -?(nan|inf)"):
        search_group(x, 4, torch.ones(32))
    with pytest.raises(ValueError, match=r"weight\[3, 5\]"):
        error_table(x, torch.ones(32), None, [4], 32)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_error_table_holds_the_error_of_each_group_at_each_width(backend):
    weight = oracle.weights(144, 72, generator())
    pivots = torch.rand(144, generator=generator(1)) + 0.1
    columns = torch.rand(72, generator=generator(2))
    table = error_table(weight, pivots, columns, WIDTHS, 32, backend=backend)
    assert table.shape == (6, 5)
    for i, bits in enumerate(WIDTHS):
        for g, start in enumerate(range(0, 144, 32)):
            rows = slice(start, min(start + 32, 144))
            expected = search_group(weight[rows], bits, pivots[rows], columns)[2]
            assert table[i, g] == expected, (bits, g)


def test_errors_fall_by_four_with_every_bit():
    """6 dB a bit, the law that allocation leans on; less where a 2-bit grid clips."""
    weight = oracle.weights(256, 256, generator())
    errors = error_table(weight, torch.ones(256), None, WIDTHS, 256)[:, 0]
    for coarse, fine, bits in zip(errors, errors[1:], np.diff(WIDTHS), strict=False):
        assert 3.0**bits < coarse / fine < 5.0**bits


def test_results_do_not_depend_on_the_number_of_threads():
    weight = oracle.weights(256, 200, generator())
    tables = []
    try:
        for threads in (1, 2, 5):
            _native.set_threads(threads)
            tables.append(error_table(weight, torch.ones(256), None, [2, 4], 32))
    finally:
        _native.set_threads(0)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(("bits", "group_rows"), [(1, 32), (9, 32), (4, 0)])
def test_widths_and_groups_that_cannot_be_are_refused(bits, group_rows):
    with pytest.raises(ValueError, match=r"bits|group_rows"):
        error_table(torch.ones(32, 8), torch.ones(32), None, [bits], group_rows)
