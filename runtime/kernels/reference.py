"""Every op in plain torch, for any device: slow, and the reference for the fast kernels.

Axes: T tokens, K input channels, N output channels, E experts, D hidden, A experts per token.
The dequantized weight is exact (`runtime/exl2/format.py` has the rule); sums are in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import read_groups
from dbrx_quant.runtime.kernels.stored import Stored, StoredList


def _gelu_tanh(x: Tensor) -> Tensor:
    y: Tensor = torch.nn.functional.gelu(x, approximate="tanh")
    return y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": torch.nn.functional.relu,
}


def _group_codes(words: Tensor, bits: int, rows: int) -> Tensor:
    """Codes [rows, N] int32 of one group from its words [rows * bits / 32, N] int32."""
    row = torch.arange(rows, device=words.device)
    word, shift = row * bits // 32, row * bits % 32
    following = (word + 1).clamp(max=words.shape[0] - 1)
    low = words[word].long() & 0xFFFFFFFF
    high = words[following].long() & 0xFFFFFFFF
    stream = low | (high << 32)  # the code is whole in here, whether it straddles or not
    codes: Tensor = (stream >> shift[:, None]) & (2**bits - 1)
    return codes.int()


def dequantize(stored: Stored, out_features: int) -> Tensor:
    """The exact weight [K, out_features] fp16, input channels in their original order."""
    q_weight, q_scale, q_scale_max, q_groups, q_invperm = stored
    groups = read_groups(q_groups, q_weight.shape[0], stored.k)
    if not torch.equal(q_invperm.sort().values, torch.arange(stored.k, device=q_invperm.device).int()):
        raise ValueError("dequantize: q_invperm does not name every row once")
    shifts = torch.arange(0, 32, 4, device=q_scale.device, dtype=torch.int32)
    nibbles = ((q_scale[:, :, None] >> shifts) & 15).reshape(q_scale.shape[0], -1)  # [G, N]
    unit = (q_scale_max.float() / 256).half().float()
    scales = ((nibbles.float() + 1) ** 2 * unit[:, None]).half().float()
    packed, start = [], 0
    for group, scale in zip(groups, scales, strict=True):
        end = start + group.word_rows
        codes = _group_codes(q_weight[start:end], group.bits, group.rows)
        packed.append(((codes - 2 ** (group.bits - 1)).float() * scale).half())
        start = end
    return torch.cat(packed)[q_invperm.long(), :out_features].contiguous()


def linear(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> Tensor:
    """The product [..., out_features] of x [..., K] and the weight, plus bias, in x's dtype."""
    y: Tensor = x.float() @ dequantize(stored, out_features).float()
    if bias is not None:
        y = y + bias[:out_features].float()
    return y.to(x.dtype)


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: StoredList,
    up: StoredList,
    down: StoredList,
    activation: str,
) -> Tensor:
    """The weighted sum over each token's experts, [T, D] in x's dtype."""
    act = ACTIVATIONS[activation]
    hidden, count = x.shape[1], len(gate)
    if top_k_index.numel() and not 0 <= int(top_k_index.min()) <= int(top_k_index.max()) <= count:
        raise ValueError(f"experts: an expert index is below 0 or above the number of experts, {count}")
    states = x.float()
    y = torch.zeros_like(states)
    for expert in torch.unique(top_k_index).tolist():
        if expert == count:
            continue
        token, position = torch.where(top_k_index == expert)
        ffn = down[expert].k
        inputs = states[token]
        gated = act(linear(inputs, gate[expert], None, ffn)) * linear(inputs, up[expert], None, ffn)
        outputs = linear(gated, down[expert], None, hidden)
        y.index_add_(0, token, outputs * top_k_weights[token, position, None].float())
    return y.to(x.dtype)
