"""A layer of transformers' `DynamicCache` with spare capacity: appending a token writes one row each.

Imports transformers' caches: import it where a model exists already.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST_ROOM = 256  # positions


class Rows:
    """A tensor [B, J, capacity, head_dim] whose first `length` positions count.

    Attributes:
        own: whether the memory behind those positions may be written.
    """

    def __init__(self, tensor: Tensor, length: int, *, own: bool) -> None:
        self.tensor, self.length, self.own = tensor, length, own

    def view(self) -> Tensor:
        return self.tensor if self.length == self.tensor.shape[-2] else self.tensor[..., : self.length, :]

    def reserve(self, length: int) -> int:
        """Reserve room for `length` positions, with spare when rows must move; returns the capacity."""
        tensor = self.tensor
        writable = torch.is_inference_mode_enabled() or not tensor.is_inference()
        if self.own and writable and length <= tensor.shape[2]:
            return tensor.shape[2]
        room = max(_LEAST_ROOM, length + length // 4)
        self.tensor = tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3])
        self.tensor[:, :, : self.length].copy_(tensor[:, :, : self.length])
        self.own = True
        return room

    def append(self, states: Tensor) -> Tensor:
        length = self.length + states.shape[2]
        self.reserve(length)
        self.tensor[:, :, self.length : length].copy_(states)
        self.length = length
        return self.view()


class SpareLayer(DynamicLayer):  # type: ignore[misc]
    """What layers with spare capacity share; their keys and values have a `length` that can be set."""

    _keys: Any = None
    _values: Any = None

    @classmethod
    def like(cls, layer: Any) -> "SpareLayer":
        """A layer with the contents of another."""
        made = cls()
        plain = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        for name, value in (plain | {"keys": layer.keys, "values": layer.values}).items():
            setattr(made, name, value)
        return made

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove positions."""
        if tokens_to_remove > 0 or self._keys is None or self._values is None:
            super().crop(tokens_to_remove)
            return
        for rows in (self._keys, self._values):
            rows.length = max(0, rows.length + tokens_to_remove)

    def advance(self, tokens: int) -> None:
        """Count positions that were written at `place`."""
        self._keys.length += tokens
        self._values.length += tokens


class GrowingLayer(SpareLayer):
    """A `DynamicLayer` that keeps its keys and values at the front of larger tensors.

    `keys` and `values` are views of what counts, and can be assigned; all that transformers does with a
    `DynamicLayer` works here. Unlike there, a view taken before `crop` shows what is appended after it.
    """

    _keys: Rows | None = None
    _values: Rows | None = None
    _place: tuple[int, ...] = ()
    _placed: tuple[Any, ...] | None = None  # what `_place` was made for; None: it is no longer good

    @property
    def keys(self) -> Tensor | None:
        """The keys [B, J, length, head_dim], or None before the first."""
        return None if self._keys is None else self._keys.view()

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys, self._placed = _adopted(tensor), None

    @property
    def values(self) -> Tensor | None:
        """The values, as the keys."""
        return None if self._values is None else self._values.view()

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values, self._placed = _adopted(tensor), None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes and dtype from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = Rows(key_states[:, :, :0], 0, own=False)
        self._values = Rows(value_states[:, :, :0], 0, own=False)
        self._placed = None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states [B, J, T, head_dim]; returns all keys and values."""
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
        if torch.compiler.is_compiling() or key_states.requires_grad or value_states.requires_grad:
            keys, values = super().update(key_states, value_states)
            return keys, values
        assert self._keys is not None
        assert self._values is not None
        self._placed = None
        return self._keys.append(key_states), self._values.append(value_states)

    def get_seq_length(self) -> int:
        """Positions that count."""
        return 0 if self._keys is None or not self._keys.tensor.numel() else self._keys.length

    def place(
        self, shape: tuple[int, int, int], dtype: torch.dtype, length: int, device: torch.device
    ) -> tuple[int, ...] | None:
        """Addresses of keys and values with room for `length` positions, and the capacity; None: no fit.

        Args:
            shape: (B, J, head_dim) that keys and values must have, if there are any yet.
            dtype: likewise.
            length: positions.
            device: likewise.
        """
        if self._placed == (shape, dtype, device) and self._place[2] >= length:
            return self._place
        if not self.get_seq_length():
            empty = torch.empty(shape[0], shape[1], 0, shape[2], dtype=dtype, device=device)
            self.lazy_initialization(empty, empty)
        keys, values = self._keys, self._values
        assert keys is not None
        assert values is not None
        for rows in (keys, values):
            found = (*rows.tensor.shape[:2], rows.tensor.shape[3])
            if found != shape or rows.tensor.dtype != dtype or rows.tensor.device != device:
                return None
        if keys.length != values.length:
            return None
        room = max(keys.reserve(length), values.reserve(length))
        keys.reserve(room)
        values.reserve(room)
        self._place = (keys.tensor.data_ptr(), values.tensor.data_ptr(), room)
        self._placed = (shape, dtype, device)
        return self._place


def _adopted(tensor: Tensor | None) -> Rows | None:
    return None if tensor is None else Rows(tensor, tensor.shape[-2] if tensor.dim() > 1 else 0, own=False)


def layers_of_kind(cache: Any, count: int, kind: Any) -> list[Any] | None:
    """The layers of a cache, those in it replaced by layers of a kind; None: it is another kind of cache.

    Args:
        cache: what transformers calls the cache.
        count: layers that it must have.
        kind: a subclass of `SpareLayer` with `place`.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers: list[Any] = cache.layers
    if any(type(layer) is not kind for layer in layers):
        if any(type(layer) is not DynamicLayer and not hasattr(layer, "place") for layer in layers):
            return None
        layers[:] = [layer if type(layer) is kind else kind.like(layer) for layer in layers]
    if len(layers) < count and cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(kind() for _ in range(count - len(layers)))
    return layers if len(layers) == count else None


def same_length(layers: Iterable[Any]) -> int | None:
    """The number of positions that every layer holds; None if they differ."""
    lengths = {layer.get_seq_length() for layer in layers}
    return lengths.pop() if len(lengths) == 1 else None
