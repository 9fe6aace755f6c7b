"""What of a linear or of a set of experts belongs to one of several processes.

Columns can be cut, in units of 32 (the format's own); rows cannot: `q_invperm` mixes all of them, and widths
fall along the mixed order. Experts stay whole.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import COLUMN_MULTIPLE, padded_columns


def share(count: int, rank: int, ranks: int) -> range:
    """The things out of `count` that belong to a rank: neighbours, with at most one more than others have."""
    each, more = divmod(count, ranks)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))


def column_share(n: int, rank: int, ranks: int) -> tuple[int, int]:
    """The columns [begin, end) out of n that belong to a rank; `begin` is a multiple of 32.

    Raises:
        ValueError: there are fewer units of 32 columns than ranks.
    """
    units = padded_columns(n) // COLUMN_MULTIPLE
    if units < ranks:
        raise ValueError(
            f"{n} columns are {units} units of {COLUMN_MULTIPLE}, too few for {ranks} processes; use at most "
            f"--tensor-parallel-size {units}"
        )
    own = share(units, rank, ranks)
    return own.start * COLUMN_MULTIPLE, min(n, own.stop * COLUMN_MULTIPLE)


def cut_columns(tensors: Mapping[str, Tensor], begin: int, end: int) -> tuple[dict[str, Tensor], int]:
    """The tensors of a linear that holds some columns of another one, without its bias.

    Args:
        tensors: those of the other linear, keyed by suffix.
        begin: first column.
        end: behind the last column.

    Returns:
        The tensors, which are the given ones where all columns are meant; and how many columns come before
        the first one meant, because it is no multiple of 32.
    """
    first, last = begin // COLUMN_MULTIPLE * COLUMN_MULTIPLE, padded_columns(end)
    cut = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
    if (first, last) != (0, cut["q_weight"].shape[1]):
        cut["q_weight"] = cut["q_weight"][:, first:last].contiguous()
        cut["q_scale"] = cut["q_scale"][:, first // 8 : last // 8].contiguous()
    return cut, begin - first


def expert_table(places: Sequence[int]) -> Tensor:
    """Expert of the model → place among those of this process, int64 [E].

    Args:
        places: the place of each expert, -1 where it is another process's. These get the number of places
            that are taken: "no expert" to `dbrxq::experts`.
    """
    own = sum(place >= 0 for place in places)
    return torch.tensor([place if place >= 0 else own for place in places], dtype=torch.int64, device="cpu")
