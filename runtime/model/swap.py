"""Quantized modules in place of a transformers model's own, and which stored tensor goes where.

Works on a model on the meta device: shapes come from the checkpoint's headers, nothing is read or filled.
"""

from typing import Any

from torch import nn

import dbrx_quant.runtime.kernels.ops  # noqa: F401  (defines the operators that the modules call)
from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec, find_source, module_linears
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.hybrid.gpu_plan import GpuPlan
from dbrx_quant.runtime.hybrid.host_embedding import HostEmbedding
from dbrx_quant.runtime.model.experts import QuantExperts
from dbrx_quant.runtime.model.linear import FusedLinear, QuantLinear


def swap_modules(model: Any, contents: Contents) -> dict[str, str]:
    """Replace each quantized linear and each set of experts of a model on the meta device.

    A fused query-key-value becomes a `FusedLinear` of the linears stored for it. A quantized head of a model
    with tied embeddings is untied: it is used beside the 16-bit embedding. Dense linears stay as they are.

    Args:
        model: a transformers causal language model of `contents.architecture`, on the meta device.
        contents: the checkpoint that will fill it.

    Returns:
        Stored tensor name → key in the model's `state_dict`, for every tensor of the contents.
    """
    architecture = contents.architecture
    table = {kept.name: kept.parameter for kept in architecture.all_floats()}
    single = [spec for spec in architecture.linears() if spec.expert is None]
    for module, specs in module_linears(single).items():
        table |= _swap_linears(model, contents, module, specs)
    for block in architecture.blocks:
        if block.experts:
            table |= _swap_experts(model, contents, block.experts)
    if (
        architecture.tied
        and "lm_head.weight" not in contents.names
        and contents.is_quantized(architecture.head)
    ):
        _untie(model)
    return {name: table[name] for name in contents.names}


def leave_on_host(model: Any, contents: Contents, plan: GpuPlan) -> None:
    """Have a model with its weights, on the host, leave there what a plan does not put on a GPU.

    Moving it to the device afterwards moves the rest.
    """
    architecture = contents.architecture
    for block in architecture.blocks:
        if block.experts and (own := plan.host_experts[block.index]):
            experts = model.get_submodule(block.experts.module)
            assert isinstance(experts, QuantExperts)
            experts.leave_on_host(own)
    if plan.embedding is not None:
        (parameter,) = (kept.parameter for kept in architecture.floats if kept.name == plan.embedding)
        weight = model.get_parameter(parameter).detach()
        model.set_submodule(parameter.removesuffix(".weight"), HostEmbedding(weight))


def _swap_linears(model: Any, contents: Contents, module: str, specs: list[LinearSpec]) -> dict[str, str]:
    """Swap the module that holds `specs`, several where it is fused; returns their part of the table."""
    if specs[0].outputs is None:
        (spec,) = specs
        if contents.is_quantized(spec):
            model.set_submodule(module, _quant_linear(contents, spec))
        return _keys(contents, spec, module)
    if not contents.is_quantized(specs[0]) and find_source(contents.checkpoint, specs[0]).rows is not None:
        return _keys(contents, specs[0], module)  # dense and stored fused, as the module is
    children = {spec.name.rpartition(".")[2]: spec for spec in specs}
    layers = {key: _child(model, contents, module, spec) for key, spec in children.items()}
    model.set_submodule(module, FusedLinear(layers))
    table: dict[str, str] = {}
    for key, spec in children.items():
        table |= _keys(contents, spec, f"{module}.{key}")
    return table


def _swap_experts(model: Any, contents: Contents, experts: ExpertsSpec) -> dict[str, str]:
    table: dict[str, str] = {}
    linears = []
    for specs in experts.linears:
        gate, up, down = (_quant_linear(contents, spec) for spec in specs)
        linears.append((gate, up, down))
        for spec in specs:
            table |= _keys(contents, spec, spec.module)
    swapped = QuantExperts(linears, keys=experts.keys, activation=experts.activation)
    model.set_submodule(experts.module, swapped)
    return table


def _child(model: Any, contents: Contents, module: str, spec: LinearSpec) -> Any:
    if contents.is_quantized(spec):
        return _quant_linear(contents, spec)
    k, n = spec.shape
    dtype = model.get_parameter(f"{module}.weight").dtype
    return nn.Linear(k, n, bias=spec.bias, device="meta", dtype=dtype)


def _quant_linear(contents: Contents, spec: LinearSpec) -> QuantLinear:
    k, n = spec.shape
    word_rows = contents.checkpoint.info(f"{spec.name}.q_weight").shape[0]
    groups = len(contents.groups[spec.name])
    return QuantLinear(k, n, word_rows=word_rows, groups=groups, bias=spec.bias, device="meta")


def _keys(contents: Contents, spec: LinearSpec, module: str) -> dict[str, str]:
    """Stored name → state key of one linear that `module` holds alone."""
    table = {f"{spec.name}.bias": f"{module}.bias"} if spec.bias else {}
    if contents.is_quantized(spec):
        return table | {f"{spec.name}.{suffix}": f"{module}.{suffix}" for suffix in SUFFIXES}
    if spec.role == "head":
        return table | {"lm_head.weight": f"{module}.weight"}
    return table | {find_source(contents.checkpoint, spec).tensor: f"{module}.weight"}


def _untie(model: Any) -> None:
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop("lm_head.weight", None)
