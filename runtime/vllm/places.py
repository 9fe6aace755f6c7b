"""Which linears of a file each layer of vLLM holds, and what vLLM's classes call the 16-bit tensors.

vLLM's modules are named as transformers', but that its linears may be fused (`qkv_proj` for `q_proj`,
`k_proj`, `v_proj`). Its classes say which (`packed_modules_mapping`), but some leave out what only some of
their models have.
"""

import re
from collections.abc import Mapping, Sequence

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.families.facts import Architecture, ExpertsSpec, LinearSpec, module_linears
from dbrx_quant.runtime.folder.contents import Contents

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_BLOCK = re.compile(r"\.(\d+)(?:\.|$)")


class Places:
    """The linears of an architecture by the names of vLLM's layers."""

    def __init__(self, architecture: Architecture) -> None:
        single = [spec for spec in architecture.linears() if spec.expert is None]
        self._by_name = {spec.name: spec for spec in single}
        self._by_module = {module: tuple(specs) for module, specs in module_linears(single).items()}
        self._experts = {block.index: block.experts for block in architecture.blocks if block.experts}
        floats = [name for kept in architecture.all_floats() for name in (kept.name, kept.parameter)]
        self._floats = set(floats)

    def linears(self, layer: str, packed: Mapping[str, Sequence[str]]) -> tuple[LinearSpec, ...]:
        """The linears that a layer holds, in the order of its outputs; none if it is no such layer.

        Args:
            layer: its full name.
            packed: last part of a fused layer's name → last parts of the names of what it holds, where that
                is not what vLLM usually means by such a name.
        """
        if layer in self._by_module:
            return self._by_module[layer]
        parent, _, own = layer.rpartition(".")
        names = [f"{parent}.{part}" for part in packed.get(own, _FUSED.get(own, ()))]
        return tuple(self._by_name[name] for name in names if name in self._by_name)

    def experts(self, layer: str) -> ExpertsSpec | None:
        """The experts of the block that a layer belongs to, if it has any."""
        found = _BLOCK.search(layer)
        return self._experts.get(int(found[1])) if found else None

    def stays_dense(self, layer: str) -> bool:
        """Whether a layer is a linear that is stored in 16 bits by design: a router."""
        return f"{layer}.weight" in self._floats


def stored_names(contents: Contents, by_module: bool) -> dict[str, str | None]:
    """Stored name → what vLLM's class calls it, of the tensors that are not packed; None: not for vLLM.

    vLLM loads the 16-bit tensors and the dense head. Biases and dense attention go with the linears, which
    are read from the file directly.

    Args:
        contents: the checkpoint.
        by_module: vLLM's class names tensors as transformers' modules, not as in the file.
    """
    architecture, checkpoint = contents.architecture, contents.checkpoint
    names: dict[str, str | None] = {}
    for name in contents.names:
        linear, _, suffix = name.rpartition(".")
        if not (suffix in SUFFIXES and linear in contents.groups):
            names[checkpoint.info(name).name] = name if linear == architecture.head.name else None
    for kept in architecture.all_floats():
        names[checkpoint.info(kept.name).name] = kept.parameter if by_module else kept.name
    return names
