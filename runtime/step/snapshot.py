"""Whether a model is unchanged: its modules, their code, attributes, tensors and hooks, its configuration."""

from collections.abc import Iterator
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.families.parts import is_quant_linear
from dbrx_quant.runtime.kernels.memo import version_sum

_OURS = ("torch", "transformers", "dbrx_quant")  # packages whose code is known here


class Snapshot:
    """What a model consists of, to detect later whether anything was replaced, changed or hooked.

    The look costs 0.2 ms for 200 linears, so it loops in C, and leaves out tables that were empty: the
    classes that run natively read no entry that wasn't there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules = list(model.modules())
        self._classes: list[type[nn.Module]] = [type(module) for module in modules]
        self._code = [(kind, kind.forward) for kind in set(self._classes)]
        tables = [t for m in modules for t in (m._modules, m._parameters, m._buffers) if t]
        self._contents = [table.values() for table in tables]
        self._objects = list(chain.from_iterable(self._contents))
        self._tensors = [thing for thing in self._objects if isinstance(thing, Tensor)]
        self._versions = version_sum(self._tensors)
        # `tensor.data = other` counts as no version; stored tensors of linears are used as repacked copies
        owners = [m for m in modules if not is_quant_linear(m)]
        self._floats = [t for m in owners for t in chain(m.parameters(False), m.buffers(False))]
        self._addresses = list(map(Tensor.data_ptr, self._floats))
        self._hooks = [t for m in modules for t in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]

        places = list(_places(modules))
        self._owners, self._keys = [owner for owner, _ in places], [key for _, key in places]
        self._values = list(map(getitem, self._owners, self._keys))
        self._containers = list(
            {id(owner): owner for owner in chain(map(vars, modules), self._owners)}.values()
        )
        self._sizes = sum(map(len, self._containers))

    def holds(self) -> bool:
        """Whether modules, code, tensors, attributes and configuration are still the same, unchanged."""
        try:
            return (
                sum(map(len, self._contents)) == len(self._objects)
                and all(map(is_, chain.from_iterable(self._contents), self._objects))
                and sum(map(len, self._containers)) == self._sizes
                and all(map(is_, map(getitem, self._owners, self._keys), self._values))
                and list(map(type, self._modules)) == self._classes
                and all(kind.forward is forward for kind, forward in self._code)
                and version_sum(self._tensors) == self._versions
                and list(map(Tensor.data_ptr, self._floats)) == self._addresses
            )
        except (KeyError, IndexError):  # an attribute was deleted
            return False

    def is_watched(self) -> bool:
        """Whether a module has a hook that would miss a step."""
        if not any(self._hooks):
            return False
        # transformers leaves its hooks that record outputs where they are; idle unless a call asks for them
        hooks = chain.from_iterable(table.values() for table in self._hooks)
        return any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)

    def is_known(self) -> bool:
        """Whether every module is in evaluation and runs code of torch, transformers or this package."""
        homes = {str(getattr(forward, "__module__", "")).partition(".")[0] for _, forward in self._code}
        homes |= {kind.__module__.partition(".")[0] for kind in self._classes}
        return homes <= set(_OURS) and not any(module.training for module in self._modules)

    def device(self) -> torch.device | None:
        """Where every tensor is; None where they are in several places, or there are none."""
        devices = {tensor.device for tensor in self._tensors}
        return devices.pop() if len(devices) == 1 else None


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute that a class has given its modules, by path.

    Without `forward` of the model itself, and without the mode: training or evaluation.
    """
    common = {*vars(nn.Module())}
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in common and (path or name != "forward")
    }


def _places(modules: list[nn.Module]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of attributes, of the mode, and of what is in configurations, dicts and lists."""
    from transformers import PreTrainedConfig

    common = {*vars(nn.Module())} - {"training"}
    seen: set[int] = set()
    waiting: list[Any] = []
    for module in modules:
        if is_quant_linear(module):  # most of all modules; its forward reads nothing else
            yield vars(module), "out_features"
            continue
        for name, value in vars(module).items():
            if name not in common:
                yield vars(module), name
                waiting.append(value)
    while waiting:
        value = waiting.pop()
        inner = vars(value) if isinstance(value, PreTrainedConfig) else value
        if isinstance(inner, (dict, list)) and id(inner) not in seen:
            seen.add(id(inner))
            yield from ((inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner))))
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
