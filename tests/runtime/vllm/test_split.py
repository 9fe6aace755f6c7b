"""Columns and experts of several processes: together they are the whole, and each is what it was."""

import pytest
import torch
from quant_models import random_linear

from dbrx_quant.runtime.exl2.format import dequantize_linear, padded_columns, validate_linear
from dbrx_quant.runtime.vllm.split import column_share, cut_columns, expert_table, share


@pytest.mark.parametrize(("count", "ranks"), [(16, 4), (16, 3), (5, 8), (1, 1)])
def test_shares_hold_everything_once_and_differ_by_one_at_most(count, ranks):
    shares = [share(count, rank, ranks) for rank in range(ranks)]
    assert [index for own in shares for index in own] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("n", "ranks"), [(6144, 8), (100, 3), (64, 2), (32, 1)])
def test_column_shares_meet_at_multiples_of_32(n, ranks):
    shares = [column_share(n, rank, ranks) for rank in range(ranks)]
    assert (shares[0][0], shares[-1][1]) == (0, n)
    assert [end for _, end in shares[:-1]] == [begin for begin, _ in shares[1:]]
    assert all(begin % 32 == 0 < end - begin for begin, end in shares)


def test_more_processes_than_units_of_columns_are_refused_with_how_many_there_may_be():
    with pytest.raises(ValueError, match="--tensor-parallel-size 3"):
        column_share(96, 0, 4)


@pytest.mark.parametrize(("n", "begin", "end"), [(128, 32, 96), (128, 16, 48), (100, 64, 100), (70, 50, 69)])
def test_cut_columns_have_the_weights_of_the_whole(n, begin, end):
    whole = random_linear(80, n, torch.Generator().manual_seed(n), bias=True)
    cut, leading = cut_columns(whole, begin, end)
    validate_linear(cut, "cut")
    assert cut["q_weight"].shape[1] == padded_columns(end) - (begin - leading)
    assert torch.equal(
        dequantize_linear(cut)[leading : leading + end - begin], dequantize_linear(whole)[begin:end]
    )


def test_all_columns_are_the_very_tensors_so_that_a_mapped_file_is_not_copied():
    whole = random_linear(64, 70, torch.Generator().manual_seed(0))
    cut, leading = cut_columns(whole, 0, 70)
    assert leading == 0
    assert all(cut[suffix] is whole[suffix] for suffix in whole)


def test_experts_of_other_processes_become_no_expert():
    assert expert_table([-1, 0, 1, -1]).tolist() == [2, 0, 1, 2]
    assert expert_table([-1, -1]).tolist() == [0, 0]
