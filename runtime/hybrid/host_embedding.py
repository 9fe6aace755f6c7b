"""The embedding of a model whose other modules are on a GPU: its rows are looked up in main memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbrx_quant.runtime.kernels.device import upload


class HostEmbedding(nn.Module):
    """The rows of tokens, on the device and in the dtype of the model, of a table that stays where it is.

    The table is a buffer under the name of the parameter that it replaces: what a model's `device` is,
    transformers reads off its first parameter.

    Args:
        weight: the table [V, D], on the host, mapped or not.
    """

    weight: Tensor
    place: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        # moves with the model, and tells where it is
        self.register_buffer("place", torch.empty(0, dtype=weight.dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows [..., D] of ids [...], which may be anywhere."""
        rows = functional.embedding(ids.cpu(), self.weight)
        return upload(rows.to(self.place.dtype), self.place.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.place = fn(self.place)
        return self

    def extra_repr(self) -> str:
        vocabulary, hidden = self.weight.shape
        return f"{vocabulary}, {hidden}, in main memory"
