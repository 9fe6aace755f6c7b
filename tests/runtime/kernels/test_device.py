"""A conversion on another device has the CPU's bytes, and meets no tensor that is still on the host."""

import dataclasses
import json
import os

import pytest
import torch
from far_device import FAR, MixedDevices, far_device
from places import TINY
from small_models import save_model, save_random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.output.record import read_record
from dbrx_quant.runtime.kernels import float_matmul
from dbrx_quant.runtime.kernels.device import CPU, find_device


def test_the_equipment_refuses_tensors_of_two_devices():
    with far_device():
        here, there = torch.ones(3, 3), torch.ones(3, 3).to(FAR)
        assert there.device == FAR
        for mixed in (
            lambda: here + there,
            lambda: there[here.bool()],
            lambda: torch.addmm(there, there, here),
            lambda: here.index_add_(0, torch.arange(3).to(FAR), here),
            lambda: here + there.sum(),
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(MixedDevices, match="tensors of two devices"):
                mixed()
        assert float((there * torch.tensor(2.0)).sum()) == 18
        here[1:] = there[1:] * 2
        assert here.sum() == 3 + 12
    with pytest.raises(NotImplementedError):
        torch.ones(3).to(FAR)


def test_the_equipment_counts_memory_once():
    with far_device() as far:
        there = torch.ones(3, 3).to(FAR)
        doubled = there * 2
        view = there[1:].T
        assert (far.now, far.peak) == (72, 72)
        del there, doubled
        assert far.now == 36, "the view still holds it"
        del view
        assert (far.now, far.peak) == (0, 72)


def files(folder):
    """All that a conversion wrote but its record, which names the device."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}


def options(model, out, tokens, **changes):
    return ConvertOptions(model, out, (3.0,), calibration=str(tokens), quiet=True, **changes)


def convert_on_both(model, folder, tokens, **changes):
    """The files of a conversion on the CPU, and on the device."""
    with sdpa_kernel(SDPBackend.MATH):  # as on the device
        convert(options(model, folder / "here", tokens, **changes))
    with far_device():
        convert(options(model, folder / "there", tokens, device="lazy", **changes))
    return files(folder / "here"), files(folder / "there")


@pytest.mark.parametrize(
    "family",
    [
        "dbrx",
        "qwen3 moe",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2 moe", "llama tied and biased")),
    ],
)
def test_a_whole_conversion_has_the_cpus_bytes(tmp_path, family, one_thread):
    model = save_model(tmp_path / "model", family, std=0.2)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 96, 16)
    here, there = convert_on_both(model, tmp_path, tokens, refit=family == "dbrx")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_rounded_products_are_the_cpus_too(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    monkeypatch.setitem(float_matmul._ROUNDS_TO, FAR.type, float_matmul._ROUNDS_TO["cpu"])
    model = save_model(tmp_path / "model", "dbrx", std=0.2)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 48, 16)
    here, there = convert_on_both(model, tmp_path, tokens)
    assert here == there


@pytest.mark.slow
def test_a_conversion_of_the_trained_model_has_the_cpus_bytes(tmp_path, one_thread):
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 24, 128, vocabulary=256)
    here, there = convert_on_both(TINY, tmp_path, tokens)
    assert here == there


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, tokens, and room."""
    folder = tmp_path_factory.mktemp("device")
    tokens = save_random_tokens(folder / "tokens.safetensors", 24, 16)
    return save_model(folder / "model", "dbrx", std=0.2), tokens, folder


def test_the_device_is_in_the_record_and_the_cpu_goes_without_saying(small, tmp_path):
    model, tokens, _ = small
    chosen = options(model, tmp_path / "out", tokens, device="lazy")
    with far_device():
        convert(chosen)
    record = read_record(tmp_path / "out")
    assert record.settings["device"] == "lazy"
    assert "--device lazy" in record.command
    for device in ("cuda:1", "cuda"):
        chosen = options(model, tmp_path / "out", tokens, device=device)
        assert chosen.settings(3.0)["device"] == "cuda", "which of several is nobody's business"
        assert chosen.command(3.0).endswith("--device cuda")
    plain = options(model, tmp_path / "out", tokens)
    assert "device" not in plain.settings(3.0)
    assert "--device" not in plain.command(3.0)


@pytest.mark.parametrize(("first", "then"), [("cpu", "lazy"), ("lazy", "cpu")])
def test_work_is_not_resumed_on_another_device(small, tmp_path, monkeypatch, first, then):
    model, tokens, _ = small
    chosen = options(model, tmp_path / "out", tokens, device=first)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with far_device():
        with monkeypatch.context() as stopping:
            stopping.setattr(conversion, "_strategies", stop)
            with pytest.raises(KeyboardInterrupt):
                convert(chosen)
        with pytest.raises(ValueError, match=r"holds work of another conversion: device was .*lazy"):
            convert(dataclasses.replace(chosen, device=then))
        convert(chosen)


@pytest.mark.parametrize("verb", [convert, lambda chosen: measure_model(chosen, chosen.out)])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("toaster", "device toaster: torch cannot compute there"),
        ("meta", "device meta: torch cannot compute there"),
        ("lazy", "device lazy: torch cannot compute there"),
        ("cuda:77", "device cuda:77: torch cannot compute there"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(small, tmp_path, verb, name, told):
    model, tokens, _ = small
    with pytest.raises(ValueError, match=told):
        verb(options(model, tmp_path / "out", tokens, device=name))
    assert not list(tmp_path.iterdir())


def test_a_device_that_rounds_products_is_refused(small, tmp_path, monkeypatch):
    model, tokens, _ = small
    monkeypatch.setattr("dbrx_quant.runtime.kernels.device._trial_error", lambda device: 3e-4)
    with far_device(), pytest.raises(ValueError, match=r"device lazy: float32 products are off by 3\.0e-04"):
        convert(options(model, tmp_path / "out", tokens, device="lazy"))


def test_work_of_versions_that_knew_no_device_goes_on(small, tmp_path):
    """The device of a work folder is only noted where it is another one than the CPU."""
    model, tokens, _ = small
    measure_model(options(model, tmp_path / "out", tokens), tmp_path / "measured.json")
    facts = json.loads((tmp_path / "out.work" / "job.json").read_text())["facts"]
    assert facts["device"] is None
    assert os.environ["DBRXQ_PRODUCTS"] == facts["products (DBRXQ_PRODUCTS)"]


def test_every_name_of_the_cpu_is_the_cpu():
    assert find_device("cpu") == find_device("cpu:0") == CPU
