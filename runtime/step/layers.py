"""What a native step needs to know of a decoder: its layers' parts, checked, and its rotations."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.parts import LayerParts, UnknownPartError
from dbrx_quant.runtime.library import _abi

_CONSTANT_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


class NotNativeError(Exception):
    """The model has a feature that the native step does not support."""


def layer_parts(model: Any) -> tuple[list[LayerParts], Tensor] | None:
    """The parts of every layer of a decoder (the model below its head), and the weight of its last norm.

    None where the model, or any layer, is none that is known here.
    """
    find = family_of(model.config.model_type).layer_parts
    if find is None or getattr(model.config, "sliding_window", None) is not None:
        return None
    try:
        found = find(model)
        shared = {(p.eps, p.head_dim, p.scale, p.clip, p.layer_norm, p.activation) for p in found.layers}
    except (UnknownPartError, AttributeError, TypeError, ValueError):  # also attributes that are gone, or odd
        return None
    if len(shared) != 1 or found.layers[0].eps != found.eps or not all(map(_is_plain, found.layers)):
        return None
    return found.layers, found.last_norm


def _is_plain(part: LayerParts) -> bool:
    """Whether a layer's numbers are such that the native library means the same by them."""
    numbers = (part.eps, part.scale, part.clip, part.expert_norm)
    experts = 1 if part.experts is None else part.experts.num_experts
    active = 1 if part.experts is None else part.active
    return (
        all(isinstance(number, (int, float)) for number in numbers)
        and part.clip > 0
        and 0 <= part.expert_norm < math.inf
        and type(active) is int
        and 1 <= active <= experts
    )


def plain_parts(model: Any) -> tuple[list[LayerParts], Tensor]:
    """As `layer_parts`, with norms and routers that are plain contiguous tensors of one dtype.

    Raises:
        NotNativeError: they are not.
    """
    found = layer_parts(model)
    if found is None:
        raise NotNativeError
    parts, last = found
    floats = [last]
    for part in parts:
        floats += [*part.norms, *(part.head_norms or ()), *([] if part.router is None else [part.router])]
    dtypes = {tensor.dtype for tensor in floats}
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() for tensor in floats)
    if not plain or len(dtypes) != 1 or not dtypes <= _abi.DTYPES.keys() or parts[0].head_dim % 16:
        raise NotNativeError
    return parts, last


def decoder_fields(parts: list[LayerParts], last: Tensor) -> dict[str, Any]:
    """The fields that the decoder structs of both libraries share: sizes, and what all layers have."""
    first = parts[0]
    heads, key_heads = (first.qkv[i].out_features // first.head_dim for i in (0, 1))
    return {
        "layer_count": len(parts),
        "hidden": last.shape[0],
        "heads": heads,
        "key_heads": key_heads,
        "head_dim": first.head_dim,
        "scale": first.scale,
        "clip": first.clip,
        "eps": first.eps,
        "layer_norm": first.layer_norm,
        "dtype": _abi.DTYPES[last.dtype],
    }


class Rotations:
    """Cosines and sines of the positions, from the model's own module; cached where they never change.

    Attributes:
        constant: whether they never change.
    """

    def __init__(self, module: Any, head_dim: int, device: torch.device) -> None:
        self._module, self._head_dim, self._device = module, head_dim, device
        self.constant = module.rope_type in _CONSTANT_ROPES
        self._table: tuple[Tensor, Tensor] | None = None

    def _compute(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, last, device=self._device)[None]
        cosines, sines = self._module(torch.empty(1, device=self._device), positions)
        expected = (1, last - first, self._head_dim)
        if cosines.shape != expected or sines.shape != expected:
            raise RuntimeError(f"rotary embedding of shape {tuple(cosines.shape)}, expected {expected}")
        return cosines[0].contiguous(), sines[0].contiguous()

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """(cosines, sines) of at least `length` positions, [.., head_dim] fp32, where they never change."""
        table = self._table
        if table is None or table[0].shape[0] < length:
            self._table = table = self._compute(0, max(256, 1 << (length - 1).bit_length()))
        return table

    def at(self, first: int, last: int) -> tuple[Tensor, Tensor, int]:
        """(cosines, sines, row of position `first` in both), [.., head_dim] fp32."""
        if not self.constant:
            return (*self._compute(first, last), 0)
        return (*self.table(last), first)
