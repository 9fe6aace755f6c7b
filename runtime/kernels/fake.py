"""Shape and dtype of every op's result, for graph tracing."""

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels import checks
from dbrx_quant.runtime.kernels.stored import Stored, StoredList


def dequantize(stored: Stored, out_features: int) -> Tensor:
    """[K, out_features] fp16."""
    return stored.q_weight.new_empty(stored.k, out_features, dtype=torch.float16)


def linear(x: Tensor, stored: Stored, bias: Tensor | None, out_features: int) -> Tensor:
    """[..., out_features] in x's dtype, for x [..., K]."""
    return x.new_empty(*x.shape[:-1], out_features)


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: StoredList,
    up: StoredList,
    down: StoredList,
    activation: str,
) -> Tensor:
    """As x; checks the linears."""
    checks.expert_linears(x, gate, up, down)
    return x.new_empty(x.shape)
