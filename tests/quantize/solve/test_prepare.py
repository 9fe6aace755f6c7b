"""Hessians in the order of their channels' variances, and their factors."""

import pytest
import torch

from dbrx_quant.quantize.solve.ldlq import factorize
from dbrx_quant.quantize.solve.prepare import prepare


@pytest.mark.parametrize("k", [1, 128, 300])
def test_channels_come_by_falling_variance_and_are_factorised_in_that_order(k):
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k))
    hessian = x.T @ x + torch.eye(k)
    hessian = (hessian + hessian.T) / 2
    prepared = prepare(hessian.clone())
    variances = hessian.diagonal()[prepared.permutation]
    assert torch.equal(variances, variances.sort(descending=True).values)
    assert torch.equal(prepared.permutation.sort().values, torch.arange(k))
    expected = factorize(hessian[prepared.permutation][:, prepared.permutation])
    assert torch.equal(prepared.factor.unit_upper, expected.unit_upper)
    assert torch.equal(prepared.factor.pivots, expected.pivots)
