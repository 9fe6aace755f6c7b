"""The operations that an estimate counts are about those that torch counts while it is done."""

import pytest
import torch
from places import TINY
from small_models import save_random_tokens
from torch.utils.flop_counter import FlopCounterMode

from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.estimate import time as estimated
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config

ROWS, LENGTH = 16, 64


def adding(_, a, b, *__, **___):
    return 2 * a[0] * a[1] * b[1]


def solving(_, b, *__, **___):
    return b[0] * b[0] * b[1]


OTHERS = {torch.ops.aten.addmm_: adding, torch.ops.aten.linalg_solve_triangular: solving}  # torch leaves out


def count(action):
    with FlopCounterMode(display=False, custom_mapping=OTHERS) as counted:
        action()
    return counted.get_total_flops()


@pytest.mark.parametrize(
    ("effort", "refit"),
    [*(pytest.param(e, False, marks=pytest.mark.slow) for e in ("fast", "default")), ("default", True)],
)
def test_products_are_counted_as_torch_counts_them(tmp_path, monkeypatch, effort, refit):
    monkeypatch.setattr("dbrx_quant.quantize.first_pass.GRADIENT_TOKENS", 256)
    monkeypatch.setattr(estimated, "SEARCHED", 0)  # the native solver's loops are no products
    monkeypatch.setattr(estimated, "SOLVED", dict.fromkeys(estimated.SOLVED, 0))
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", ROWS, LENGTH, vocabulary=256)
    usual = {"calibration": str(tokens), "effort": effort, "refit": refit, "quiet": True}
    options = ConvertOptions(TINY, tmp_path / "out", (3.0,), **usual)
    architecture, all_tokens = describe(load_config(TINY)), ROWS * LENGTH
    measured = count(lambda: measure_model(options, tmp_path / "measurement.json"))
    expected = estimated.measuring_operations(architecture, all_tokens * 7 // 8, effort)
    assert expected == pytest.approx(measured, rel=0.1)
    quantized = count(lambda: convert(options))
    expected = estimated.quantizing_operations(architecture, all_tokens, effort, effort != "fast", refit)
    assert expected == pytest.approx(quantized, rel=0.25)


def test_a_machine_has_a_speed_and_keeps_its_threads():
    threads = torch.get_num_threads()
    assert 1e8 < estimated.machine_speed() < 1e14
    assert torch.get_num_threads() == threads
