"""Where a model's layers go: to one device, or consecutive ones to each of several, by free memory.

Between devices only the states of the tokens travel. Device maps are those of transformers and accelerate.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.families.facts import FloatSpec, LinearSpec
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.library import _cuda, _gpus

AUTO = "auto"
_SHARE = 0.9  # of free memory for weights; the cache, workspaces and the program's own take the rest
_STEPS = 60  # of a bisection, far below a byte

DeviceMap = dict[str, torch.device]  # module -> device; "" is the whole model


@dataclass(frozen=True)
class Part:
    """What stays together on a device: a module of the transformers model, and its bytes there."""

    module: str
    size: int


def find_devices(name: str | torch.device) -> list[torch.device]:
    """The devices that a name stands for: `cpu`, `cuda`, `cuda:0,cuda:1`, or `auto`.

    `auto` is all GPUs on which the CUDA kernels run, in the order of their numbers, or the CPU where there is
    no GPU.

    Raises:
        RuntimeError: there is no such GPU, or the CUDA kernels cannot run there; or there are GPUs, and they
            run on none of them.
        ValueError: torch knows no such device, one is named twice, or the CPU is named beside others.
    """
    if name == AUTO:
        return _usable_gpus() or [torch.device("cpu")]
    try:
        devices = [torch.device(part) for part in str(name).split(",")]
    except RuntimeError as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from error
    for device in devices:
        _cuda.require_usable(device)
    if len(devices) > 1:
        _check_several(str(name), devices)
    return devices


def _usable_gpus() -> list[torch.device]:
    gpus = [torch.device("cuda", gpu.index) for gpu in _gpus.find_gpus()]
    refused = {gpu: reason for gpu in gpus if (reason := _cuda.why_unavailable(gpu)) is not None}
    if gpus and len(refused) == len(gpus):
        reason = refused[gpus[0]]
        raise RuntimeError(f"device auto: the CUDA kernels run on no GPU here: {reason}")
    return [gpu for gpu in gpus if gpu not in refused]


def _check_several(name: str, devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cpu":
            raise ValueError(f"device {name}: layers go to GPUs or to the CPU, not to both; leave out cpu")
        if device.index is None:
            raise ValueError(f"device {name}: {device} has no number; write {device}:0")
    if len(set(devices)) < len(devices):
        raise ValueError(f"device {name}: a device is named twice")


def place(contents: Contents, itemsize: int, devices: Sequence[torch.device], fewest: bool) -> DeviceMap:
    """The device map of a quantized model; as `choose`.

    Args:
        contents: what is loaded.
        itemsize: bytes of a number of the tensors that are not quantized.
        devices: in the order of the data.
        fewest: whether the first devices are enough if they have room; else all are used.
    """
    return choose(list_parts(contents, itemsize), devices, fewest)


def choose(parts: Sequence[Part], devices: Sequence[torch.device], fewest: bool) -> DeviceMap:
    """The device map: one entry where one device takes all parts, else one for each.

    Args:
        parts: in the order of the data.
        devices: likewise.
        fewest: whether the first devices are enough if they have room; else all are used.

    Raises:
        ValueError: the devices have too little free memory, or of one among several it is not known.
    """
    free = {device: size for device in devices if (size := free_memory(device)) is not None}
    if len(free) < len(devices):
        if len(devices) > 1:
            raise ValueError(f"{', '.join(map(str, devices))}: only GPUs share a model; give one device")
        return {"": devices[0]}
    if fewest:
        for count in range(1, len(devices)):
            first = {device: free[device] for device in devices[:count]}
            if _fill(parts, first, _SHARE) is not None:
                return spread(parts, first)
    return spread(parts, free)


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be taken on a GPU, what torch holds without use included; None of other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def spread(parts: Sequence[Part], free: Mapping[torch.device, int]) -> DeviceMap:
    """Consecutive parts on each device, so that the fullest is as little full as possible.

    Args:
        parts: in the order of the data.
        free: bytes of each device, in the order of the data; nine tenths of them are for weights.

    Raises:
        ValueError: the parts do not fit.
    """
    low, high = 0.0, _SHARE
    best = _fill(parts, free, high)
    if best is None:
        needed, devices = sum(part.size for part in parts), " and ".join(map(str, free))
        raise ValueError(
            f"the model takes {_gb(needed)}, and {devices} can hold {_gb(_SHARE * sum(free.values()))} of "
            f"weights ({_gb(sum(free.values()))} are free); use a smaller one, more GPUs, the CPU, or, for "
            "a mixture, one GPU with --gpu-memory, which leaves experts in main memory"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = _fill(parts, free, middle)
        if tried is None:
            low = middle
        else:
            best, high = tried, middle
    return {"": next(iter(best.values()))} if len(set(best.values())) == 1 else best


def _fill(parts: Sequence[Part], free: Mapping[torch.device, int], share: float) -> DeviceMap | None:
    """The parts on the devices, each filled up to a share of what is free; None where they do not fit."""
    left = iter(free.items())
    device, size = next(left)
    room, placed = share * size, {}
    for part in parts:
        while part.size > room:
            following = next(left, None)
            if following is None:
                return None
            device, room = following[0], share * following[1]
        room -= part.size
        placed[part.module] = device
    return placed


def list_parts(contents: Contents, itemsize: int) -> list[Part]:
    """Embedding, layers, final norm and head with their bytes on a GPU, in the order of the data.

    Args:
        contents: what is loaded.
        itemsize: bytes of a number of the tensors that are not quantized.
    """
    architecture = contents.architecture

    def size(linears: Iterable[LinearSpec], floats: Iterable[FloatSpec]) -> int:
        return sum(_linear_size(contents, spec, itemsize) for spec in linears) + sum(
            itemsize * prod(kept.shape) for kept in floats
        )

    embedding, *last = (Part(_module(kept), size((), (kept,))) for kept in architecture.floats)
    blocks = [Part(block.module, size(block.linears(), block.floats)) for block in architecture.blocks]
    head = Part(architecture.head.module, size((architecture.head,), ()))
    if architecture.tied and not contents.is_quantized(architecture.head):
        return [Part(embedding.module, embedding.size), Part(head.module, 0), *blocks, *last]  # one tensor
    return [embedding, *blocks, *last, head]


def _module(kept: FloatSpec) -> str:
    return kept.parameter.rpartition(".")[0]


def _linear_size(contents: Contents, spec: LinearSpec, itemsize: int) -> int:
    if not contents.is_quantized(spec):
        return itemsize * prod(spec.shape)
    stored = sum(contents.checkpoint.info(f"{spec.name}.{suffix}").nbytes for suffix in SUFFIXES)
    return stored + 4 * spec.shape[0]  # and the permutation that the kernels read


def settle(model: Any) -> None:
    """Finish a model that accelerate has spread over devices by its `hf_device_map`.

    What nothing is stored for, such as the table of rotary frequencies, goes to the first device. Inside an
    entry of the map all is on one device, so the hooks that accelerate put on every linear there are removed.
    """
    from accelerate.hooks import remove_hook_from_module

    entries = [model.get_submodule(name) for name in model.hf_device_map]
    own_hooks = set(map(id, entries))
    first = next(iter(model.hf_device_map.values()))
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            tensor = module._buffers[name]
            if tensor is not None and tensor.device.type == "cpu":
                module._buffers[name] = tensor.to(first)
    for entry in entries:
        for module in entry.modules():
            if id(module) not in own_hooks and hasattr(module, "_hf_hook"):
                remove_hook_from_module(module)
                module.__dict__.pop("forward", None)  # accelerate leaves the class's own there, as if patched


def check_device_map(device_map: Any) -> None:
    """Refuse a device map whose entries would do nothing, or name a GPU on which the kernels cannot run.

    Raises:
        RuntimeError: there is no such GPU, or the CUDA kernels cannot run there.
        ValueError: something is offloaded to the CPU or the disk.
    """
    if not isinstance(device_map, dict):
        return  # transformers makes a map of it, and asks again
    places = {str(place) for place in device_map.values()}
    offloaded = places & {"cpu", "disk"} if len(places) > 1 else places & {"disk"}
    if offloaded:
        raise ValueError(
            f"device_map: {' and '.join(sorted(offloaded))} would hold no weights: accelerate offloads "
            "parameters, packed weights are buffers, and those stay on the device that computes; name GPUs "
            "alone, or the CPU for the whole model (there, memory= leaves experts on the disk)"
        )
    for place in places:
        _cuda.require_usable(torch.device("cuda", int(place)) if place.isdecimal() else torch.device(place))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
