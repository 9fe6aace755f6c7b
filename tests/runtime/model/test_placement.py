"""A model on several devices: which layers go where, and the same tokens as on one."""

import pytest
import torch
from far_device import far_device
from quant_models import CONFIGS, build_quantized_folder
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.library import _cuda, _gpus
from dbrx_quant.runtime.model import load, placement
from dbrx_quant.runtime.model.linear import FusedLinear, _has_hooks
from dbrx_quant.runtime.model.placement import Part, check_device_map, choose, find_devices, spread
from dbrx_quant.runtime.step.native_step import use_native_step

FIRST, SECOND, THIRD = (torch.device("cuda", i) for i in range(3))
LAYERS = [Part("embed", 20), *(Part(f"layers.{i}", 10) for i in range(10)), Part("norm", 1), Part("head", 19)]
IDS = torch.arange(24).reshape(2, 12) * 5 % 128
NEAR, FAR = torch.device("lazy", 0), torch.device("lazy", 1)


def loads(device_map, parts=LAYERS):
    sizes = {device: 0 for device in device_map.values()}
    for part in parts:
        sizes[device_map[part.module]] += part.size
    return list(sizes.values())


def test_layers_stay_in_order_and_fill_devices_alike():
    placed = spread(LAYERS, {FIRST: 200, SECOND: 200})
    assert list(placed) == [part.module for part in LAYERS]
    assert list(placed.values()) == sorted(placed.values(), key=str)
    assert loads(placed) == [70, 70]


def test_a_device_gets_as_much_as_it_has_room_for():
    assert loads(spread(LAYERS, {FIRST: 300, SECOND: 100})) == [110, 30]
    assert loads(spread(LAYERS, {FIRST: 60, SECOND: 60, THIRD: 60})) == [50, 50, 40]


def test_no_other_split_leaves_more_room_on_the_fullest():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 40, (7,), generator=generator).tolist()
        rooms = torch.randint(120, 400, (3,), generator=generator).tolist()
        free = dict(zip((FIRST, SECOND, THIRD), rooms, strict=True))
        parts = [Part(str(i), size) for i, size in enumerate(sizes)]
        splits = [(a, b) for a in range(8) for b in range(a, 8)]
        best = min(
            max(
                sum(chunk) / room
                for chunk, room in zip((sizes[:a], sizes[a:b], sizes[b:]), rooms, strict=True)
            )
            for a, b in splits
        )
        placed = spread(parts, free)
        ours = {device: 0.0 for device in free}
        for part in parts:
            ours[placed.get(part.module, placed.get(""))] += part.size
        assert max(ours[device] / free[device] for device in free) == pytest.approx(best)


def test_what_does_not_fit_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"takes 0\.0 GB, and cuda:0 can hold") as refused:
        spread(LAYERS, {FIRST: 155})
    assert "use a smaller one, more GPUs, the CPU, or, for a mixture, one GPU with --gpu-memory" in str(
        refused.value
    )
    assert spread(LAYERS, {FIRST: 156}) == {"": FIRST}


def test_auto_takes_as_few_devices_as_do(monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda device: 100)
    devices = (FIRST, SECOND, THIRD)
    assert set(choose(LAYERS, devices, fewest=True).values()) == {FIRST, SECOND}
    assert set(choose(LAYERS, devices, fewest=False).values()) == set(devices)
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    assert choose(LAYERS, devices, fewest=True) == {"": FIRST}


def test_the_parts_hold_the_bytes_of_the_model(tmp_path):
    for family in ("dbrx", "llama tied and biased"):
        folder = build_quantized_folder(CONFIGS[family](), tmp_path / family, head=family == "dbrx").path
        architecture = describe(load_config(folder))
        contents = read_contents(architecture, architecture.open(folder))
        model = load_model(folder)
        tables = sum(4 * spec.shape[0] for spec in architecture.linears() if contents.is_quantized(spec))
        tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" not in n)]
        biases = sum(tensor.nbytes for name, tensor in model.named_buffers() if name.endswith(".bias"))
        parts = placement.list_parts(contents, 4)
        assert sum(part.size for part in parts) == sum(t.nbytes for t in tensors) + tables - biases
        assert all(model.get_submodule(part.module) for part in parts)


# ---- Names of devices -------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs, the last of which the kernels do not run on."""
    found = [_gpus.Gpu(i, f"GPU {i}", 61 if i == 2 else 86, 24 << 30) for i in range(3)]
    monkeypatch.setattr(_gpus, "find_gpus", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "why_unavailable", lambda device: "too old" if device.index == 2 else None)
    return found


def test_auto_is_every_gpu_that_the_kernels_run_on(gpus):
    assert find_devices("auto") == [FIRST, SECOND]
    del gpus[:2]
    with pytest.raises(RuntimeError, match="device auto: the CUDA kernels run on no GPU here: too old"):
        find_devices("auto")
    gpus.clear()
    assert find_devices("auto") == [torch.device("cpu")]


def test_devices_are_named_one_by_one(gpus):
    assert find_devices("cuda:1,cuda:0") == [SECOND, FIRST]
    assert find_devices(torch.device("cuda")) == [torch.device("cuda")]
    for name, error, said in [
        ("cuda:0,cuda:2", RuntimeError, "device cuda:2: too old"),
        ("cuda:0,cpu", ValueError, "layers go to GPUs or to the CPU, not to both"),
        ("cuda,cuda:1", ValueError, "cuda has no number; write cuda:0"),
        ("cuda:0,cuda:0", ValueError, "named twice"),
        ("warp", ValueError, "device warp: "),
        ("", ValueError, "device : "),
    ]:
        with pytest.raises(error, match=said):
            find_devices(name)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading_that_would_do_nothing_is_refused(place, tmp_path):
    folder = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "model").path
    parts = ("wte", "blocks.0", "norm_f", "rotary_emb")
    device_map = {f"transformer.{name}": "cuda:0" for name in parts} | {"lm_head": "cuda:0"}
    device_map["transformer.blocks.1"] = place
    for load_it in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"device_map: {place} would hold no weights"):
            load_it(folder, device_map=device_map)


def test_the_cpu_alone_is_no_offloading():
    check_device_map({"": torch.device("cpu")})
    check_device_map({"model": "cpu", "lm_head": "cpu"})


# ---- Two devices, neither of them the host ----------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads would not know the devices
    monkeypatch.setattr(load, "find_devices", lambda name: [NEAR, FAR])
    with far_device(), torch.no_grad():
        yield


@pytest.mark.parametrize("family", ["dbrx", "llama tied and biased"])
def test_a_model_on_two_devices_gives_the_tokens_of_one(family, two_devices, monkeypatch, tmp_path):
    folder = build_quantized_folder(CONFIGS[family](), tmp_path / "model", head=family == "dbrx").path
    monkeypatch.setattr(placement, "free_memory", lambda device: 1 << 20)
    model = load_model(folder, device="two", dtype=torch.float32)
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    assert devices == {"lazy:0", "lazy:1"}
    assert model.device == NEAR
    inner = [m for m in model.modules() if isinstance(m, FusedLinear)]
    assert not any(_has_hooks(child) for m in inner for child in m.children())
    ours = model.generate(IDS.to(NEAR), max_new_tokens=5, do_sample=False).cpu()
    monkeypatch.undo()
    with use_native_step(False):
        assert torch.equal(ours, load_model(folder).generate(IDS, max_new_tokens=5, do_sample=False))
