"""A layer of transformers' `DynamicCache` that keeps keys and values as bytes, for steps on a GPU.

Each head of each position has a scale: its largest magnitude over 127. The kernels read and write the bytes;
transformers' own code, which runs prompts, gets all of them as numbers of the model's dtype.

`cache_bits.py` has the switch.

Imports transformers' caches: import it where a model exists already.
"""

from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.step.kv_cache import Rows, SpareLayer

_MOST = 127.0


def to_bytes(states: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, fp32 scales [.., 1]) of states [.., head_dim]; what is not finite makes its scale NaN."""
    values = states.float()
    scales = values.abs().amax(-1, keepdim=True) / _MOST
    scales = torch.where(values.isfinite().all(-1, keepdim=True), scales, float("nan"))
    codes = (values / scales).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)
    return codes, scales


class _ByteRows:
    """Positions [B, J, length, head_dim] as codes and scales, with spare room."""

    def __init__(self, states: Tensor) -> None:
        codes, scales = to_bytes(states)
        length = states.shape[2]
        self.codes, self.scales = Rows(codes, length, own=True), Rows(scales, length, own=True)

    @property
    def length(self) -> int:
        return self.codes.length

    @length.setter
    def length(self, length: int) -> None:
        self.codes.length = self.scales.length = length

    def append(self, states: Tensor) -> None:
        codes, scales = to_bytes(states)
        self.codes.append(codes)
        self.scales.append(scales)

    def reserve(self, length: int) -> int:
        room = max(self.codes.reserve(length), self.scales.reserve(length))
        self.codes.reserve(room)
        self.scales.reserve(room)
        return room

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.view().float() * self.scales.view()).to(dtype)


class ByteLayer(SpareLayer):
    """A `DynamicLayer` of bytes; `keys` and `values` are made of them whenever they are asked for."""

    _keys: _ByteRows | None = None
    _values: _ByteRows | None = None

    @property
    def keys(self) -> Tensor | None:
        """The keys [B, J, length, head_dim], or None before the first."""
        return None if self._keys is None else self._keys.numbers(self.dtype)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys = None if tensor is None or tensor.dim() < 2 else _ByteRows(tensor)

    @property
    def values(self) -> Tensor | None:
        """The values, as the keys."""
        return None if self._values is None else self._values.numbers(self.dtype)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values = None if tensor is None or tensor.dim() < 2 else _ByteRows(tensor)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes and dtype from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = _ByteRows(key_states[:, :, :0]), _ByteRows(value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states [B, J, T, head_dim]; returns all keys and values."""
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None
        assert self._values is not None
        self._keys.append(key_states)
        self._values.append(value_states)
        return self._keys.numbers(self.dtype), self._values.numbers(self.dtype)

    def get_seq_length(self) -> int:
        """Positions that count."""
        return 0 if self._keys is None else self._keys.length

    def place(
        self, shape: tuple[int, int, int], dtype: torch.dtype, length: int, device: torch.device
    ) -> tuple[int, ...] | None:
        """Addresses of keys, values and their scales with room for `length` positions; None: no fit.

        Args:
            shape: (B, J, head_dim) that keys and values must have, if there are any yet.
            dtype: of their numbers, likewise.
            length: positions.
            device: likewise.

        Returns:
            (keys, values, scales of keys, scales of values, capacity).
        """
        if not self.get_seq_length():
            empty = torch.empty(shape[0], shape[1], 0, shape[2], dtype=dtype, device=device)
            self.lazy_initialization(empty, empty)
        assert self._keys is not None
        assert self._values is not None
        for rows in (self._keys, self._values):
            codes = rows.codes.tensor
            if (*codes.shape[:2], codes.shape[3]) != shape or self.dtype != dtype or codes.device != device:
                return None
        room = max(self._keys.reserve(length), self._values.reserve(length))
        self._keys.reserve(room)
        self._values.reserve(room)
        tensors = (self._keys.codes, self._values.codes, self._keys.scales, self._values.scales)
        return (*(rows.tensor.data_ptr() for rows in tensors), room)
