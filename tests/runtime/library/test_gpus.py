"""What a driver or a GPU cannot run is known before any work, and said with the way out."""

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.library import _cuda, _gpus
from dbrx_quant.runtime.library._gpus import Build, Gpu, why_not_on

PASCAL, TURING = Gpu(0, "GTX 1080", 61, 8 << 30), Gpu(0, "RTX 2080", 75, 8 << 30)
ADA, HOPPER, BLACKWELL = (Gpu(1, f"GPU {c}", c, 24 << 30) for c in (89, 90, 120))
WHEEL = Build.parse(12090, "75-real,80-real,86-real,89-real,90-real,100-real,120")
OLD = Build.parse(13000, "80")  # machine code and PTX of 8.0 alone, by CUDA 13


class Machine:
    """GPUs, a driver and a library that are not there; the real rules judge them."""

    def __init__(self, monkeypatch, gpus=(), driver=12080, build=WHEEL, probe=None):
        self.loads = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(_gpus, "find_gpus", lambda: list(gpus))
        monkeypatch.setattr(_gpus, "driver_version", lambda: driver)
        monkeypatch.setattr(_cuda.LIBRARY, "why_unavailable", lambda: None)
        monkeypatch.setattr(_cuda, "build", lambda: build)
        monkeypatch.setattr(_cuda, "_probe", lambda gpu: probe)


@pytest.fixture
def machine(monkeypatch):
    _cuda._why_not_on.cache_clear()
    yield lambda *gpus, **more: Machine(monkeypatch, gpus, **more)
    _cuda._why_not_on.cache_clear()


def test_targets_are_read_as_cmake_names_them():
    assert WHEEL.machine_code == (75, 80, 86, 89, 90, 100, 120)
    assert WHEEL.ptx == (120,)
    assert Build.parse(12080, "80-virtual") == Build(12080, (), (80,))
    assert str(OLD) == "8.0, PTX of 8.0"
    assert str(Build.parse(12080, "")) == "unknown targets"


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 103, 120, 121])
def test_the_wheel_runs_on_every_generation_under_the_first_driver_of_its_cuda(capability):
    assert why_not_on(Gpu(0, "any", capability, 1), WHEEL, 12000) is None


def test_machine_code_runs_on_later_members_of_a_generation_and_nowhere_else():
    build = Build(12080, (86,), ())
    assert why_not_on(ADA, build, 12080) is None
    for gpu in (Gpu(0, "A100", 80, 1), HOPPER, BLACKWELL):
        assert "the CUDA library has code for 8.6; build from source for it" in why_not_on(gpu, build, 12080)


def test_a_draft_is_refused_everywhere():
    draft = Build.parse(13000, "draft")
    assert str(draft) == "none: a draft"
    refused = why_not_on(Gpu(0, "H100", 90, 80 << 30), draft, 13000)
    assert "built on a machine without a GPU" in refused
    assert "DBRXQ_CUDA_ARCHITECTURES=90" in refused


def test_pascal_is_refused():
    reason = why_not_on(PASCAL, WHEEL, 13000)
    assert reason == (
        "GTX 1080 (cuda:0) has compute capability 6.1, the CUDA kernels need 7.5 (Turing) or newer; "
        "run on the CPU"
    )


def test_turing_needs_code_of_its_own():
    assert why_not_on(TURING, WHEEL, 12000) is None
    assert "DBRXQ_CUDA_ARCHITECTURES=75" in why_not_on(TURING, OLD, 13000)


@pytest.mark.parametrize("gpu", [ADA, HOPPER, BLACKWELL])
def test_a_driver_of_an_older_cuda_is_to_be_updated(gpu):
    reason = why_not_on(gpu, OLD, 12080)
    assert "the NVIDIA driver is for CUDA 12.8, the CUDA kernels are built with 13.0" in reason
    assert "update the driver to 580.65 or newer" in reason


def test_ptx_needs_a_driver_as_new_as_the_compiler():
    build = Build(12080, (80,), (80,))
    assert why_not_on(BLACKWELL, build, 12080) is None
    reason = why_not_on(BLACKWELL, build, 12020)
    assert "has PTX alone, and the driver is for CUDA 12.2: update it to 570.26 or newer, or build" in reason
    assert "DBRXQ_CUDA_ARCHITECTURES=120" in reason


def test_a_library_that_does_not_name_its_targets_is_left_to_the_driver():
    assert why_not_on(HOPPER, Build(12080, (), ()), 12080) is None


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, 12080, "is built without CUDA"),
        ("12.8", 0, "there is no NVIDIA driver"),
        ("13.0", 12020, "torch is built for 13.0: update the driver to 580.65 or newer"),
        ("12.8", 12080, "is CUDA_VISIBLE_DEVICES set"),
    ],
)
def test_without_a_gpu_the_reason_is_found(cuda, driver, said, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_gpus, "driver_version", lambda: driver)
    assert said in _gpus.why_no_gpu()


def test_a_device_is_judged_by_its_number(machine):
    machine(ADA, PASCAL)
    assert _cuda.why_unavailable(torch.device("cuda")) is None
    assert _cuda.why_unavailable(torch.device("cuda", 0)) is None
    assert "6.1" in _cuda.why_unavailable(torch.device("cuda", 1))
    assert _cuda.why_unavailable(torch.device("cuda", 2)) == "there is no GPU 2, torch finds 2"
    assert _cuda.why_unavailable(torch.device("cpu")) is None


def test_the_driver_has_the_last_word(machine):
    machine(ADA, probe="the driver said no")
    assert _cuda.why_unavailable(torch.device("cuda")) == "the driver said no"


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("gpus", "more", "said"),
    [
        ((PASCAL,), {}, "need 7.5"),
        ((BLACKWELL,), {"driver": 12080, "build": OLD}, "update the driver"),
        ((), {}, "device cuda"),
    ],
)
def test_a_model_is_refused_before_anything_is_read(load, gpus, more, said, machine, tmp_path):
    folder = build_quantized_folder(CONFIGS["llama tied and biased"](), tmp_path / "model").path
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-8])  # reading it would say so
    machine(*gpus, **more)
    place = {"device": "cuda"} if load is load_model else {"device_map": "cuda"}
    with pytest.raises(RuntimeError, match=said):
        load(folder, **place)
