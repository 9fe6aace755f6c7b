"""Matrix products of a warp: which lane holds which element, from the formulas of the PTX ISA.

For every shape, the manual gives row and column of element i of a lane's fragment in terms of
groupID = lane >> 2 and threadID_in_group = lane % 4. Written down here as it has them, not from any kernel.
"""

from dataclasses import dataclass

import numpy as np

_LANE = np.arange(32)
_GROUP, _THREAD = _LANE >> 2, _LANE % 4


@dataclass(frozen=True)
class Shape:
    """Of an mma: rows, columns and length of its sums; `a`, `b`, `c` place [elements, 32] → (row, column)."""

    m: int
    n: int
    k: int
    a: tuple
    b: tuple
    c: tuple


def _places(count, row, column):
    """(rows, columns) [count, 32] of the elements of a fragment."""
    rows = np.stack([np.broadcast_to(row(i), 32) for i in range(count)])
    columns = np.stack([np.broadcast_to(column(i), 32) for i in range(count)])
    return rows, columns


def _accumulators():
    return _places(4, lambda i: _GROUP if i < 2 else _GROUP + 8, lambda i: _THREAD * 2 + (i & 1))


SHAPES = {
    # "Matrix Fragments for mma.m16n8k8", .f16
    "m16n8k8": Shape(
        16,
        8,
        8,
        _places(4, lambda i: _GROUP if i < 2 else _GROUP + 8, lambda i: _THREAD * 2 + (i & 1)),
        _places(2, lambda i: _THREAD * 2 + i, lambda i: _GROUP),
        _accumulators(),
    ),
    # "Matrix Fragments for mma.m16n8k16 with floating point type", .f16 and .bf16
    "m16n8k16": Shape(
        16,
        8,
        16,
        _places(
            8,
            lambda i: _GROUP if i < 2 or 4 <= i < 6 else _GROUP + 8,
            lambda i: _THREAD * 2 + (i & 1) + (8 if i >= 4 else 0),
        ),
        _places(4, lambda i: _THREAD * 2 + (i & 1) + (8 if i >= 2 else 0), lambda i: _GROUP),
        _accumulators(),
    ),
}


def matrices(elements, places, rows, columns):
    """[warps, rows, columns] of fragments [warps, elements, 32]."""
    order = np.argsort((places[0] * columns + places[1]).reshape(-1))
    return elements.reshape(len(elements), -1)[:, order].reshape(-1, rows, columns)


def multiply(shape, a, b, c):
    """Fragments [warps, elements, 32]: a, b float32 of exact inputs, c float32 → a b + c.

    Sums are made in float64 and rounded once: a tensor core rounds in steps of its own, with errors of the
    same size that no manual tells.
    """
    left = matrices(a, shape.a, shape.m, shape.k).astype(np.float64)
    right = matrices(b, shape.b, shape.k, shape.n).astype(np.float64)
    total = left @ right + matrices(c, shape.c, shape.m, shape.n)
    return total.astype(np.float32)[:, shape.c[0], shape.c[1]]
