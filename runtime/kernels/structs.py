"""Linears as the C structs of the CPU library: pointers into stored tensors, which must stay alive."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dbrx_quant.runtime.kernels import checks
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.library import _abi

_CACHE_LIMIT = 512  # blocks whose tables are kept
_tables: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


def describe_linear(stored: Stored, bias: Tensor | None, out_features: int) -> _abi.Linear:
    """The struct of a linear, whose tensors are contiguous."""
    word_rows, n = stored.q_weight.shape
    return _abi.Linear(
        stored.q_weight.data_ptr(),
        stored.q_scale.data_ptr(),
        stored.q_scale_max.data_ptr(),
        stored.q_groups.data_ptr(),
        stored.q_invperm.data_ptr(),
        None if bias is None else bias.data_ptr(),
        stored.k,
        n,
        word_rows,
        stored.q_scale_max.shape[0],
        out_features,
    )


def describe_experts(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> tuple[Any, Any, Any]:
    """Arrays of E structs for gate, up and down, checked and built once for the same memory.

    For 16 experts that costs 0.3 ms, more than a decode step of small experts: hence the cache. Its key
    holds the place and size of every tensor and the shape of every matrix: no table is used for other memory.
    """
    tensors = (*gate.tensors, *up.tensors, *down.tensors)
    shapes = [tensor.shape for tensor in tensors[::5]]
    key = (x.shape[1], *map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *shapes)
    tables = _tables.get(key)
    if tables is None:
        checks.expert_linears(x, gate, up, down)
        ffn = [stored.k for stored in down]
        tables = (_table(gate, ffn), _table(up, ffn), _table(down, [x.shape[1]] * len(ffn)))
        if len(_tables) >= _CACHE_LIMIT:
            _tables.clear()
        _tables[key] = tables
    return tables


def _table(linears: StoredList, widths: Sequence[int]) -> Any:
    """An array of structs; widths[e] is the number of output columns of linear e."""
    structs = (describe_linear(stored, None, width) for stored, width in zip(linears, widths, strict=True))
    return (_abi.Linear * len(linears))(*structs)
