"""How steps on a GPU choose the next token by themselves, and the memory that they need for it."""

import ctypes
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from dbrx_quant.runtime.library import _abi

MOST_ROWS = 8  # kMostRows of csrc/cuda/decoder/decoder.cuh
NOTED = 64  # tokens noted on the device at a time


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: 0 for the likeliest token.
        top_k: among the likeliest this many; 0 for all.
        top_p: among the fewest that have this share of the chance; 1 for all.
        seed: of the choice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one is out of its bounds.
        """
        for name, value, plain in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf")),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("seed", self.seed, 0 <= self.seed < 1 << 64),
        ):
            if not plain:
                raise ValueError(f"sampling: {name} {value} is out of bounds")


def _tensors(head: Any) -> tuple[Any, ...]:
    return (*head.stored(), head.bias)


class Ahead:
    """What steps need on the device to choose the tokens of the next ones.

    Args:
        head: the linear behind the last norm.
        address: of its struct.
        vocabulary: its outputs.
        device: where it is.
    """

    def __init__(self, head: Any, address: int, vocabulary: int, device: torch.device) -> None:
        self._tensors, self.address = _tensors(head), address
        self._logits = torch.empty(MOST_ROWS, vocabulary, device=device)
        self._sampling = torch.zeros(ctypes.sizeof(_abi.CudaSampling), dtype=torch.uint8, device=device)
        self.generated = torch.zeros(MOST_ROWS, NOTED, dtype=torch.int64, device=device)
        self.made = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)

    def serves(self, head: Any) -> bool:
        """Whether it was made for a head with these tensors."""
        now = _tensors(head)
        return len(now) == len(self._tensors) and all(map(is_, now, self._tensors))

    def begin(self, sampling: Sampling) -> None:
        struct = _abi.CudaSampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
        self._sampling.copy_(torch.frombuffer(bytearray(bytes(struct)), dtype=torch.uint8))

    def describe(self, step: _abi.CudaStep) -> None:
        step.logits, step.sampling = self._logits.data_ptr(), self._sampling.data_ptr()
        step.generated, step.made, step.room = self.generated.data_ptr(), self.made.data_ptr(), NOTED
