"""Linears in the layout of the CUDA kernels: q_weight *tiled*, in place of the file's words or beside them.

The kernels read the words in another order than the file has them (csrc/cuda/tile_layout.h), in equal memory.
A tiled q_weight is int32 [word rows, N / 4, 4]: its three dimensions tell it from the file's [R, N], wherever
it is passed, copied or saved. `QuantLinear` holds the tiled words alone while it is on a GPU; for an operator
that is given the file's words there, a tiled copy is kept as long as they live.

Axes: K input channels, N output channels as stored, G groups, U units of 32 rows, R word rows of the file.
A last unit of 16 rows takes one word row more when tiled.
"""

import contextlib
import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import WIDTHS, GroupMap, read_groups
from dbrx_quant.runtime.kernels.memo import remember, version_sum
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _abi, _cuda

_UNIT = 32
_MAX_CHANNELS = 65536


@dataclass(frozen=True)
class DeviceLinear:
    """A linear as the kernels read it.

    Attributes:
        struct: its sizes and pointers, without a bias and with all stored columns.
        made: the tensors that the struct points into, except for those of the file or the module.
    """

    struct: _abi.CudaLinear
    made: tuple[Tensor, ...]

    def described(self, out_features: int, bias: Tensor | None = None) -> _abi.CudaLinear:
        """The struct for `out_features` output columns and an optional bias."""
        struct = _abi.CudaLinear.from_buffer_copy(self.struct)
        struct.out_features = out_features
        struct.bias = None if bias is None else bias.data_ptr()
        return struct


_linears: dict[tuple[int, ...], tuple[int, DeviceLinear]] = {}  # ids of the tensors -> (versions, linear)


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor lives where the CUDA kernels run."""
    return tensor.is_cuda


def stream(device: torch.device) -> int | None:
    """The current stream of a GPU; none for other devices, where the tests' emulator runs."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one; nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def require_no_capture(device: torch.device, what: str) -> None:
    """Refuse what must be prepared before a graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} is not in device layout yet; run the model once before capturing a graph")


def tile(stored: Stored) -> Tensor:
    """The tiled q_weight, int32 [word rows, N / 4, 4], new memory, of a linear with the file's.

    Raises:
        RuntimeError: the library or the device is missing.
        ValueError: the group table is no legal map.
    """
    struct = _sizes(stored)
    rows = sum((struct.first_unit[i + 1] - struct.first_unit[i]) * width for i, width in enumerate(WIDTHS))
    q_weight = stored.q_weight
    words = torch.empty(rows, struct.n // 4, 4, dtype=torch.int32, device=q_weight.device)
    with current(q_weight.device):
        status = _cuda.library().dbrxq_cuda_repack(
            ctypes.byref(struct), q_weight.data_ptr(), words.data_ptr(), stream(q_weight.device)
        )
    _cuda.check(status, "repack")
    return words


def untile(stored: Stored) -> Tensor:
    """The file's q_weight, int32 [R, N], new memory, of a linear with a tiled one; raises as `tile` does."""
    struct = _sizes(stored)
    struct.words = stored.q_weight.data_ptr()
    rows = sum(group.word_rows for group in _groups(stored))
    q_weight = torch.empty(rows, struct.n, dtype=torch.int32, device=stored.q_weight.device)
    with current(q_weight.device):
        status = _cuda.library().dbrxq_cuda_unpack(
            ctypes.byref(struct), q_weight.data_ptr(), stream(q_weight.device)
        )
    _cuda.check(status, "unpack")
    return q_weight


def device_linear(stored: Stored) -> DeviceLinear:
    """The linear as the kernels read it, made when it is new or its tensors were modified.

    Raises:
        RuntimeError: the library or the device is missing, or a graph is being captured.
        ValueError: the group table is no legal map, or the permutation none.
    """
    key, seen = tuple(map(id, stored)), version_sum(stored)
    found = _linears.get(key)
    if found is not None and found[0] == seen:
        return found[1]
    made = _make(stored)
    remember(_linears, key, stored, (seen, made))
    return made


def _groups(stored: Stored) -> GroupMap:
    """The group table, read on the host."""
    k, rows = stored.k, stored.q_weight.shape[0]
    try:
        return read_groups(stored.q_groups, rows - (k % _UNIT != 0) if stored.tiled else rows, k)
    except ValueError as error:
        raise ValueError(f"linear.q_groups: {error}") from error


def _units(groups: GroupMap) -> list[int]:
    return [-(-group.rows // _UNIT) for group in groups]


def _sizes(stored: Stored) -> _abi.CudaLinear:
    """The struct of a linear without its pointers."""
    groups, k = _groups(stored), stored.k
    if k > _MAX_CHANNELS:
        raise ValueError(f"linear: {k} input channels, at most {_MAX_CHANNELS}")
    counts = [
        sum(units for units, group in zip(_units(groups), groups, strict=True) if group.bits == width)
        for width in WIDTHS
    ]
    first_unit = [sum(counts[:i]) for i in range(len(counts) + 1)]
    bounds = (ctypes.c_int32 * len(first_unit))(*first_unit)
    return _abi.CudaLinear(k=k, n=stored.n, out_features=stored.n, units=first_unit[-1], first_unit=bounds)


def _make(stored: Stored) -> DeviceLinear:
    device, struct = stored.q_weight.device, _sizes(stored)
    require_no_capture(device, "a linear")
    rows = torch.arange(struct.k, device=device, dtype=torch.int32)
    if not torch.equal(stored.q_invperm.sort().values, rows):
        raise ValueError("linear.q_invperm: is not a permutation of the rows")
    permutation = torch.full((_UNIT * struct.units,), -1, dtype=torch.int32, device=device)
    permutation[stored.q_invperm.long()] = rows
    units = torch.tensor(_units(_groups(stored)))
    group = torch.repeat_interleave(torch.arange(len(units)), units).int().to(device)
    unit_scale = stored.q_scale_max.view(torch.int16).int()[group] << 16 | group
    made = [unit_scale, permutation]
    struct.unit_scale, struct.permutation = unit_scale.data_ptr(), permutation.data_ptr()
    for name, tensor, alignment in (
        ("words", stored.q_weight if stored.tiled else tile(stored), 16),
        ("scale_codes", stored.q_scale, 8),
    ):
        ready = aligned(tensor, alignment)
        setattr(struct, name, ready.data_ptr())
        if ready is not stored.q_weight and ready is not stored.q_scale:
            made.append(ready)
    return DeviceLinear(struct, tuple(made))


def aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor, or a copy where it does not start at a multiple of `alignment` bytes."""
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()
