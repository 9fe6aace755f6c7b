"""Every op through the native CUDA library; falls back to `reference`, with one warning, where it is missing.

What the kernels read beside the stored tensors is made the first time a linear is used (`cuda_tiles`), which
reads its group table on the host; afterwards an op only enqueues kernels on the current stream, in memory
from torch's allocator, and can be captured in a CUDA graph once it has run outside.

Axes: T tokens, K input channels, N output channels as stored, E experts, A experts per token.
"""

import ctypes
import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels import checks, reference
from dbrx_quant.runtime.kernels.cuda_tiles import (
    DeviceLinear,
    aligned,
    current,
    device_linear,
    require_no_capture,
    stream,
)
from dbrx_quant.runtime.kernels.memo import remember, version_sum
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.library import _abi, _cuda

_logger = logging.getLogger(__name__)

# From so many tokens on, fp16 meets the reconstructed weights through torch (cuBLAS): they are as exact
# there, and it has the faster product of large matrices. bf16 would round them to 8 bits.
_DENSE_TOKENS = 512

_blocks: dict[tuple[int, ...], tuple[int, "Block"]] = {}  # ids of the tensors -> (versions, block)


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning("CUDA kernels are not used, plain torch runs instead (much slower): %s", reason)


def _native_ready(stored: Stored) -> bool:
    """Whether the native library runs the ops on a linear's device; says so once when it does not.

    Raises:
        RuntimeError: it does not, and the words are in its layout.
    """
    reason = _cuda.why_unavailable(stored.q_weight.device)
    if reason is None:
        return True
    if stored.tiled:
        raise RuntimeError(f"q_weight is in the layout of the CUDA kernels, which are missing: {reason}")
    _warn_once(reason)
    return False


def _workspace(status: int, size: ctypes.c_int64, device: torch.device, what: str) -> Tensor:
    _cuda.check(status, what)
    return torch.empty(max(1, size.value), dtype=torch.uint8, device=device)


def dequantize(stored: Stored, out_features: int) -> Tensor:
    """The exact weight [K, out_features] fp16, input channels in their original order."""
    if not _native_ready(stored):
        return reference.dequantize(stored, out_features)
    struct = device_linear(stored).described(out_features)
    device = stored.q_weight.device
    weight = torch.empty(stored.k, out_features, dtype=torch.float16, device=device)
    with current(device):
        status = _cuda.library().dbrxq_cuda_reconstruct(
            ctypes.byref(struct), weight.data_ptr(), stream(device)
        )
    _cuda.check(status, "dequantize")
    return weight


def linear(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> Tensor:
    """The product [..., out_features] of x [..., K] and the weight, plus bias, in x's dtype."""
    if not _native_ready(stored):
        return reference.linear(x, stored, bias, out_features)
    if x.dtype == torch.float16 and x.numel() >= _DENSE_TOKENS * stored.k:
        y = x @ dequantize(stored, out_features)
        return y if bias is None else y + bias[:out_features]
    struct = device_linear(stored).described(out_features, bias)
    inputs = aligned(x.contiguous(), 16)
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    tokens, dtype, size = y.numel() // out_features, _abi.DTYPES[x.dtype], ctypes.c_int64()
    native = _cuda.library()
    with current(x.device):
        status = native.dbrxq_cuda_linear_workspace(ctypes.byref(struct), tokens, dtype, ctypes.byref(size))
        workspace = _workspace(status, size, x.device, "linear")
        status = native.dbrxq_cuda_linear_forward(
            ctypes.byref(struct),
            inputs.data_ptr(),
            tokens,
            dtype,
            y.data_ptr(),
            workspace.data_ptr(),
            stream(x.device),
        )
    _cuda.check(status, "linear")
    return y


@dataclass(frozen=True)
class Block:
    """The experts of a block; `table` holds on the device the structs of all gates, all ups and all downs."""

    struct: _abi.CudaExperts
    table: Tensor
    linears: tuple[DeviceLinear, ...]


def _make_block(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> Block:
    require_no_capture(x.device, "a block of experts")
    checks.expert_linears(x, gate, up, down)
    count, hidden = len(gate), x.shape[1]
    widths = {stored.k for stored in down}
    if len(widths) != 1:
        raise ValueError(
            f"experts: hidden sizes {sorted(widths)} differ; the CUDA kernels take one size a block"
        )
    ffn = widths.pop()
    linears, structs = [], []
    for role, out_features in ((gate, ffn), (up, ffn), (down, hidden)):
        for stored in role:
            linears.append(device_linear(stored))
            structs.append(linears[-1].described(out_features))
    host = torch.frombuffer(bytearray(bytes((_abi.CudaLinear * len(structs))(*structs))), dtype=torch.uint8)
    table = host.to(x.device)
    step = count * ctypes.sizeof(_abi.CudaLinear)
    places = [table.data_ptr() + i * step for i in range(3)]
    return Block(_abi.CudaExperts(*places, count, hidden, ffn, 0, 0), table, tuple(linears))


def expert_block(x: Tensor, gate: StoredList, up: StoredList, down: StoredList) -> Block:
    """The experts of a block as the kernels read them, made when they are new or were modified.

    Raises:
        RuntimeError: the library or the device is missing, or a graph is being captured.
        ValueError: they are not of one size, or do not fit x [.., D].
    """
    tensors = (*gate.tensors, *up.tensors, *down.tensors)
    key, seen = (x.shape[1], *map(id, tensors)), version_sum(tensors)
    found = _blocks.get(key)
    if found is not None and found[0] == seen:
        return found[1]
    made = _make_block(x, gate, up, down)
    remember(_blocks, key, tensors, (seen, made))
    return made


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: StoredList,
    up: StoredList,
    down: StoredList,
    activation: str,
) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in x's dtype.

    An index outside 0..E adds nothing, as E itself does: the device does not report to the host.
    """
    if not _native_ready(gate[0]):
        checks.expert_linears(x, gate, up, down)
        return reference.experts(x, top_k_index, top_k_weights, gate, up, down, activation)
    block = expert_block(x, gate, up, down)
    struct = _abi.CudaExperts.from_buffer_copy(block.struct)
    struct.activation = _abi.ACTIVATIONS[activation]
    inputs = aligned(x.contiguous(), 16)
    index, weights = top_k_index.to(torch.int64).contiguous(), top_k_weights.to(torch.float32).contiguous()
    y = torch.empty_like(inputs)
    (tokens, active), dtype, size = index.shape, _abi.DTYPES[x.dtype], ctypes.c_int64()
    if not tokens or not active:
        return y.zero_()
    native = _cuda.library()
    with current(x.device):
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
            stream(x.device),
        )
    _cuda.check(status, "experts")
    return y
