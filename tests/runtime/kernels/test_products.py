"""Products that are faster must still be float32, and the setting must not outlive its block."""

import pytest
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


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_products_are_of_activations_rounded_as_asked(asked, monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", asked)
    x, weight = torch.randn(30, 64), torch.randn(48, 64).bfloat16().float()
    dtype = float_matmul.rounded_dtype()
    assert str(dtype) == f"torch.{asked}"
    found = float_matmul.product(x, float_matmul.narrowed(weight))
    exact = x.to(dtype).float() @ weight.T
    torch.testing.assert_close(found, exact, rtol=2**-7 if asked == "bfloat16" else 1e-5, atol=1e-4)
    with float_matmul.rounded_products():
        mixed = x @ weight.T
    assert (mixed - x @ weight.T).norm() <= 2**-8 * mixed.norm()


def test_another_precision_of_products_is_refused(monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "half")
    with pytest.raises(ValueError, match="DBRXQ_PRODUCTS is 'half'; expected float32 or bfloat16"):
        float_matmul.rounded_dtype()


def test_rounding_ends_with_its_block(monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    x = torch.randn(64, 64)
    before = x @ x
    with pytest.raises(KeyError), float_matmul.rounded_products():
        raise KeyError
    assert torch.equal(x @ x, before)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_a_gpu_rounds_to_bfloat16_where_it_multiplies_it(monkeypatch, capability, dtype):
    monkeypatch.delenv("DBRXQ_PRODUCTS")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    float_matmul._bfloat16_pays.cache_clear()
    assert float_matmul.rounded_dtype(torch.device("cuda")) == dtype
    float_matmul._bfloat16_pays.cache_clear()


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "name", "dtype"),
    [
        (True, True, "Intel Xeon", torch.bfloat16),
        (False, True, "Intel Xeon", torch.float32),
        (False, True, "AMD EPYC", torch.bfloat16),
        (False, False, "AMD EPYC", torch.float32),
        (False, True, None, torch.float32),  # a torch that does not tell
    ],
)
def test_a_cpu_rounds_to_bfloat16_where_that_is_faster(monkeypatch, amx, avx512_bf16, name, dtype):
    monkeypatch.delenv("DBRXQ_PRODUCTS")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    if name is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    float_matmul._bfloat16_pays.cache_clear()
    assert float_matmul.rounded_dtype() == dtype
    float_matmul._bfloat16_pays.cache_clear()


def test_gpus_are_exact_but_where_products_may_round(monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    settings, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = settings.fp32_precision, settings.allow_bf16_reduced_precision_reduction
    with float_matmul.exact_on_gpus(), float_matmul.fast_products():
        assert settings.fp32_precision == "ieee"
        assert not settings.allow_bf16_reduced_precision_reduction
        with float_matmul.rounded_products():
            assert settings.fp32_precision == "ieee", "those of the CPU"
        with float_matmul.rounded_products(cuda):
            assert settings.fp32_precision == "tf32"
        monkeypatch.setenv("DBRXQ_PRODUCTS", "float32")
        with float_matmul.rounded_products(cuda):
            assert settings.fp32_precision == "ieee"
    assert before == (settings.fp32_precision, settings.allow_bf16_reduced_precision_reduction)
