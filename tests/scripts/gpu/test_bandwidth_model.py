"""The model of the GPU's memory: its plans hold all work, and it follows what it is made of."""

import pytest

from dbrx_quant.scripts.gpu import bandwidth_model as model

SMALL = model.Gpu(4, 1.0, 100, 8, 1, 500)
PAIR = model.Product(1024, 1024, 3, pairs=True)


@pytest.mark.parametrize("product", [PAIR, model.Product(2048, 512)], ids=str)
def test_both_plans_hold_every_unit_and_shares_differ_by_one(product):
    for plan in (model.waves, model.shares):
        assert sum(map(sum, plan(product, SMALL))) == product.units * product.tiles
    equal = [units for block in model.shares(product, SMALL) for units in block]
    assert max(equal) - min(equal) <= 1


def test_one_wave_and_a_bit_takes_twice_as_long_as_equal_shares_where_instructions_bound():
    slow = model.Loop(10_000, 0, 0, 10_000, 2)
    places = SMALL.multiprocessors * model.BLOCKS_TOGETHER
    one_more = [[8] * model.WARPS] * (places + 1)
    full = [[8] * model.WARPS] * places
    times = [model.microseconds(SMALL, 2, blocks, slow, 100.0) for blocks in (full, one_more)]
    assert 1.3 < times[1] / times[0] < 2.1


def test_memory_bounds_a_launch_whose_instructions_are_few():
    product = model.Product(4096, 4096)
    fast = model.Loop(1, 0, 0, 1, 8)
    wide = model.Gpu(4, 1.0, 100, 1, 1, 500)
    time = model.microseconds(wide, 4, model.shares(product, wide), fast, 0.0)
    reached = product.gigabytes(4) / (time * 1e-6) / wide.gigabytes
    assert 0.85 < reached <= model.PEAK_SHARE
