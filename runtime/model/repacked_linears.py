"""A loaded model's linears get their bodies out of the folder's repacked file, where it has one."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.folder.repacked_file import open_repacked
from dbrx_quant.runtime.kernels.bodies import Body, give_body
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.model.linear import QuantLinear
from dbrx_quant.runtime.model.memory import Memory

_logger = logging.getLogger(__name__)


def use_repacked(
    model: Any,
    contents: Contents,
    keys: Mapping[str, str],
    memory: Memory | None,
    staying: Collection[str] | None = None,
) -> None:
    """Give the linears that are on the CPU their bodies; the log says why a file is not used.

    Args:
        model: with its weights.
        contents: what it was loaded from.
        keys: stored tensor name → key in the model's `state_dict`.
        memory: what stays in memory; None: all bodies are mapped, and the system keeps them as it has room.
        staying: linears that stay on the CPU; None: those that are there now.
    """
    linears: dict[str, QuantLinear] = {}
    for name in contents.groups:
        module = model.get_submodule(keys[f"{name}.q_weight"].rpartition(".")[0])
        assert isinstance(module, QuantLinear)
        if module.q_weight.device.type == "cpu" and (staying is None or name in staying):
            linears[name] = module
    bodies = mapped_bodies(contents) if memory is None and linears else memory.bodies() if memory else {}
    for name, module in linears.items():
        if (body := bodies.get(name)) is not None:
            stored = module.stored()
            tensors = stored if module.bias is None else (*stored, module.bias)
            give_body(tensors, module.out_features, body)


def mapped_bodies(contents: Contents) -> dict[str, Body]:
    """Linear → its body in the folder's repacked file; none where there is no file that can be used."""
    if not _native.available():
        return {}
    try:
        file = open_repacked(contents)
        return {} if file is None else file.mapped_bodies()
    except (CheckpointError, OSError) as error:
        _logger.warning("%s; until then its linears are repacked in memory", error)
        return {}
