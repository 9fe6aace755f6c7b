"""Every op through the native CUDA library; falls back to `reference`, with one warning, where it is missing.

A linear is repacked into the device layout the first time it is used (`device_linear`), which reads its
group table on the host; afterwards an op only enqueues kernels on the current stream, and can be captured in
a CUDA graph once it has run outside. The stored tensors stay as they are: the repacked words are a copy of
q_weight's size that lives as long as q_weight does, unless it is modified.

Axes: T tokens, K input channels, N output channels as stored, G groups, U units of 32 rows, E experts,
A experts per token.
"""

import contextlib
import ctypes
import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dbrx_quant.runtime import _cuda, _native
from dbrx_quant.runtime.backends import checks, reference
from dbrx_quant.runtime.format import WIDTHS, read_groups

_logger = logging.getLogger(__name__)

_COLUMNS = 128  # of a tile, csrc/cuda/tile_layout.h
_UNIT = 32
_MAX_CHANNELS = 65536


@dataclass(frozen=True)
class DeviceLinear:
    """A linear in device layout; `struct` points into the tensors beside it.

    Attributes:
        struct: what the library reads, without a bias and with all stored columns.
        words: int32 [sum of units * bits, N rounded up to 128].
        scale_codes: int32 [G, words.shape[1] / 8].
        unit_scale: int32 [U], a unit's group in the low 16 bits, the bits of its scale_max in the high ones.
        permutation: int32 [32 U], -1 beyond K.
    """

    struct: _cuda.CudaLinear
    words: Tensor
    scale_codes: Tensor
    unit_scale: Tensor
    permutation: Tensor

    def described(self, out_features: int, bias: Tensor | None = None) -> _cuda.CudaLinear:
        """The struct with `out_features` columns wanted and a bias."""
        struct = _cuda.CudaLinear.from_buffer_copy(self.struct)
        struct.out_features = out_features
        struct.bias = None if bias is None else bias.data_ptr()
        return struct


class _Memory:
    """Whether tensors are still the objects, with the contents, that something was made from."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._seen) and all(
            reference() is tensor and version == _version(tensor)
            for (reference, version), tensor in zip(self._seen, tensors, strict=True)
        )


_linears: Any = WeakTensorKeyDictionary()  # q_weight -> (_Memory, DeviceLinear)
_blocks: Any = WeakTensorKeyDictionary()  # gate 0's q_weight -> (_Memory, _Block)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning("CUDA kernels are not used, plain torch runs instead (much slower): %s", reason)


def _native_ready() -> bool:
    """Whether the native library runs the ops; says so once when it does not."""
    reason = _cuda.why_unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one; nothing for other devices, where the tests' emulator runs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _require_no_capture(device: torch.device, what: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} is not in device layout yet: run the model once before capturing a graph")


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


def _repack(
    q_weight: Tensor, q_scale: Tensor, q_scale_max: Tensor, q_groups: Tensor, q_invperm: Tensor
) -> DeviceLinear:
    device, n, k = q_weight.device, q_weight.shape[1], q_invperm.shape[0]
    _require_no_capture(device, "a linear")
    try:
        groups = read_groups(q_groups, q_weight.shape[0], k)
    except ValueError as error:
        raise ValueError(f"linear.q_groups: {error}") from error
    if k > _MAX_CHANNELS:
        raise ValueError(f"linear: {k} input channels, at most {_MAX_CHANNELS}")
    rows = torch.arange(k, device=device, dtype=torch.int32)
    if not torch.equal(q_invperm.sort().values, rows):
        raise ValueError("linear.q_invperm: does not name every row once")
    units = [-(-group.rows // _UNIT) for group in groups]
    permutation = torch.full((_UNIT * sum(units),), -1, dtype=torch.int32, device=device)
    permutation[q_invperm.long()] = rows
    counts = [sum(u for u, g in zip(units, groups, strict=True) if g.bits == width) for width in WIDTHS]
    first_unit = [sum(counts[:i]) for i in range(len(counts) + 1)]
    columns = -(-n // _COLUMNS) * _COLUMNS
    word_rows = sum(count * width for count, width in zip(counts, WIDTHS, strict=True))
    scale_codes = _aligned(torch.nn.functional.pad(q_scale, (0, (columns - n) // 8)), 8)
    words = torch.empty(word_rows, columns, dtype=torch.int32, device=device)
    unit_group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(units)).int().to(device)
    unit_scale = q_scale_max.view(torch.int16).int()[unit_group] << 16 | unit_group
    struct = _cuda.CudaLinear(
        words.data_ptr(),
        scale_codes.data_ptr(),
        unit_scale.data_ptr(),
        permutation.data_ptr(),
        None,
        k,
        n,
        n,
        sum(units),
        (ctypes.c_int32 * (_cuda.WIDTHS + 1))(*first_unit),
    )
    with _current(device):
        status = _cuda.library().dbrxq_cuda_repack(ctypes.byref(struct), q_weight.data_ptr(), _stream(device))
    _cuda.check(status, "repack")
    return DeviceLinear(struct, words, scale_codes, unit_scale, permutation)


def device_linear(
    q_weight: Tensor, q_scale: Tensor, q_scale_max: Tensor, q_groups: Tensor, q_invperm: Tensor
) -> DeviceLinear:
    """The linear in device layout, repacked when it is new or its tensors were modified.

    Raises:
        RuntimeError: the library or the device is missing, or a graph is being captured.
        ValueError: the group table is no legal map, or the permutation none.
    """
    stored = (q_weight, q_scale, q_scale_max, q_groups, q_invperm)
    found = _linears.get(q_weight)
    if found is not None and found[0].holds(stored):
        linear: DeviceLinear = found[1]
        return linear
    made = _repack(*stored)
    _linears[q_weight] = (_Memory(stored), made)
    return made


def _workspace(status: int, size: ctypes.c_int64, device: torch.device, what: str) -> Tensor:
    _cuda.check(status, what)
    return torch.empty(max(1, size.value), dtype=torch.uint8, device=device)


def dequantize(
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    out_features: int,
) -> Tensor:
    """The exact weight [K, out_features] fp16, input channels in their original order."""
    if not _native_ready():
        return reference.dequantize(q_weight, q_scale, q_scale_max, q_groups, q_invperm, out_features)
    struct = device_linear(q_weight, q_scale, q_scale_max, q_groups, q_invperm).described(out_features)
    device = q_weight.device
    weight = torch.empty(q_invperm.shape[0], out_features, dtype=torch.float16, device=device)
    with _current(device):
        status = _cuda.library().dbrxq_cuda_reconstruct(
            ctypes.byref(struct), weight.data_ptr(), _stream(device)
        )
    _cuda.check(status, "dequantize")
    return weight


def linear(
    x: Tensor,
    q_weight: Tensor,
    q_scale: Tensor,
    q_scale_max: Tensor,
    q_groups: Tensor,
    q_invperm: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """The product [..., out_features] of x [..., K] and the weight, plus bias, in x's dtype."""
    if not _native_ready():
        return reference.linear(x, q_weight, q_scale, q_scale_max, q_groups, q_invperm, bias, out_features)
    struct = device_linear(q_weight, q_scale, q_scale_max, q_groups, q_invperm).described(out_features, bias)
    inputs = _aligned(x.contiguous(), 16)
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    tokens, dtype, size = y.numel() // out_features, _cuda.DTYPES[x.dtype], ctypes.c_int64()
    native = _cuda.library()
    with _current(x.device):
        status = native.dbrxq_cuda_linear_workspace(ctypes.byref(struct), tokens, dtype, ctypes.byref(size))
        workspace = _workspace(status, size, x.device, "linear")
        status = native.dbrxq_cuda_linear_forward(
            ctypes.byref(struct),
            inputs.data_ptr(),
            tokens,
            dtype,
            y.data_ptr(),
            workspace.data_ptr(),
            _stream(x.device),
        )
    _cuda.check(status, "linear")
    return y


@dataclass(frozen=True)
class _Block:
    """The experts of a block; `table` holds on the device the structs of all gates, all ups and all downs."""

    struct: _cuda.CudaExperts
    table: Tensor
    linears: tuple[DeviceLinear, ...]


def _make_block(x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> _Block:
    _require_no_capture(x.device, "a block of experts")
    checks.expert_linears(x, gate, up, down)
    count, hidden = len(gate) // 5, x.shape[1]
    widths = {down[5 * e + 4].shape[0] for e in range(count)}
    if len(widths) != 1:
        raise ValueError(
            f"experts: hidden sizes {sorted(widths)} differ; the CUDA kernels take one size a block"
        )
    ffn = widths.pop()
    linears, structs = [], []
    for tensors, out_features in ((gate, ffn), (up, ffn), (down, hidden)):
        for e in range(count):
            linears.append(device_linear(*tensors[5 * e : 5 * e + 5]))
            structs.append(linears[-1].described(out_features))
    host = torch.frombuffer(bytearray(bytes((_cuda.CudaLinear * len(structs))(*structs))), dtype=torch.uint8)
    table = host.to(x.device)
    step = count * ctypes.sizeof(_cuda.CudaLinear)
    places = [table.data_ptr() + i * step for i in range(3)]
    return _Block(_cuda.CudaExperts(*places, count, hidden, ffn, 0, 0), table, tuple(linears))


def _block(x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> _Block:
    stored = (*gate, *up, *down)
    found = _blocks.get(gate[0])
    if found is not None and found[0].holds(stored) and found[1].struct.hidden == x.shape[1]:
        block: _Block = found[1]
        return block
    made = _make_block(x, gate, up, down)
    _blocks[gate[0]] = (_Memory(stored), made)
    return made


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in x's dtype; lists hold five tensors an expert.

    An index outside 0..E adds nothing, as E itself does: the device does not report to the host.
    """
    if not _native_ready():
        checks.expert_linears(x, gate, up, down)
        return reference.experts(x, top_k_index, top_k_weights, gate, up, down, activation)
    block = _block(x, gate, up, down)
    struct = _cuda.CudaExperts.from_buffer_copy(block.struct)
    struct.activation = _native.ACTIVATIONS[activation]
    inputs = _aligned(x.contiguous(), 16)
    index, weights = top_k_index.to(torch.int64).contiguous(), top_k_weights.to(torch.float32).contiguous()
    y = torch.empty_like(inputs)
    (tokens, active), dtype, size = index.shape, _cuda.DTYPES[x.dtype], ctypes.c_int64()
    if not tokens or not active:
        return y.zero_()
    native = _cuda.library()
    with _current(x.device):
        status = native.dbrxq_cuda_experts_workspace(
            ctypes.byref(struct), tokens, active, dtype, ctypes.byref(size)
        )
        workspace = _workspace(status, size, x.device, "experts")
        status = native.dbrxq_cuda_experts_forward(
            ctypes.byref(struct),
            inputs.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            tokens,
            active,
            dtype,
            y.data_ptr(),
            workspace.data_ptr(),
            _stream(x.device),
        )
    _cuda.check(status, "experts")
    return y
