"""Products that are faster must still be float32, and the setting must not outlive its block."""

import torch

from dbrx_quant.runtime.kernels import float_matmul


def test_products_inside_the_block_are_float32():
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    with float_matmul.fast_products():
        result = a @ b
    truth = a.double() @ b.double()
    assert (result - truth).norm() / truth.norm() < 1e-5


def test_the_setting_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with float_matmul.fast_products():
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_cpu_that_rounds_keeps_the_default(monkeypatch):
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(float_matmul, "_error", lambda: 1e-3)
    with float_matmul.fast_products() as exact:
        assert not exact
        assert torch.backends.mkldnn.matmul.fp32_precision == before
