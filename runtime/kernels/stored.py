"""The stored tensors of a linear as one value: what checks and kernels take.

The dispatcher knows lists of tensors only; `ops.py` makes these of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Stored(NamedTuple):
    """The tensors of a linear as `format.py` describes them, by its names and in its order.

    On a GPU q_weight may be *tiled* (`cuda_tiles.py`): int32 [word rows, N / 4, 4].
    """

    q_weight: Tensor
    q_scale: Tensor
    q_scale_max: Tensor
    q_groups: Tensor
    q_invperm: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Stored":
        """Pick the stored tensors out of those of a linear keyed by suffix."""
        return cls._make(map(tensors.__getitem__, cls._fields))

    @property
    def k(self) -> int:
        """Input channels."""
        return self.q_invperm.shape[0]

    @property
    def n(self) -> int:
        """Output channels as stored."""
        shape = self.q_weight.shape
        return shape[1] * (shape[2] if len(shape) == 3 else 1)

    @property
    def tiled(self) -> bool:
        """Whether q_weight is in the layout of the CUDA kernels."""
        return self.q_weight.dim() == 3


class StoredList:
    """Several linears in one list, five tensors each, as operators take them; split on access.

    Kernels ask when a list is new to them: splitting those of 16 experts in every call would cost a tenth.

    Attributes:
        tensors: the list.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, linears: Iterable[Mapping[str, Tensor]]) -> "StoredList":
        """The stored tensors of linears keyed by suffix."""
        return cls([tensor for tensors in linears for tensor in Stored.of(tensors)])

    def __len__(self) -> int:
        return len(self.tensors) // 5

    def __getitem__(self, index: int) -> Stored:
        return Stored(*self.tensors[5 * index : 5 * index + 5])

    def __iter__(self) -> Iterator[Stored]:
        return (self[index] for index in range(len(self)))
