"""What a run has executed and moved: instructions, sectors of global memory, wavefronts of shared memory.

A warp's access to global memory takes as many sectors of 32 bytes as it touches; ideal are as many as its
distinct bytes fill. Shared memory serves one word of each of its 32 banks in a wavefront, accesses of 8 and
16 bytes a half and a quarter of a warp at a time; ideal are as many wavefronts as the distinct words of
each part fill.
"""

from collections import Counter

import numpy as np

_NONE = np.int64(-1)


class Counts(Counter):
    """Figures of one kernel by their names; instructions are those of warps."""

    def instruction(self, opcode, warps):
        """An instruction that `warps` warps have executed."""
        parts = opcode.split(".")
        kind = "f16x2" if parts[-1] == "f16x2" else parts[0]
        if parts[0] in ("ld", "st"):
            space = next(
                (part for part in parts[1:] if part in ("global", "shared", "local", "param")), "generic"
            )
            kind = f"{parts[0]}.{space}"
        self[f"instructions {kind}"] += warps
        self["instructions"] += warps

    def global_access(self, what, lanes, at, size):
        """An access of `size` bytes a lane at the addresses `at`."""
        table = _by_warps(lanes, at, 32)
        distinct = _distinct(table)
        sectors = _distinct(np.where(table >= 0, table >> 5, _NONE))
        self[f"{what} sectors"] += int(sectors.sum())
        self[f"{what} sectors, ideal"] += int(-(-distinct * size // 32).sum())

    def shared_access(self, lanes, at, size):
        """An access of `size` bytes a lane at the offsets `at` in a block's shared memory."""
        together = 32 if size <= 4 else 128 // size
        first = _by_warps(lanes, at, together) >> 2
        words = np.concatenate(
            [np.where(first >= 0, first + i, _NONE) for i in range(max(1, size // 4))], axis=1
        )
        words.sort(axis=1)
        new = np.ones(words.shape, bool)
        new[:, 1:] = words[:, 1:] != words[:, :-1]
        new &= words >= 0
        part, _ = np.nonzero(new)
        banks = np.bincount(part * 32 + (words[new] & 31), minlength=32 * len(words)).reshape(-1, 32)
        self["shared wavefronts"] += int(banks.max(axis=1).sum())
        self["shared wavefronts, ideal"] += int(-(-banks.sum(axis=1) // 32).sum())


def _by_warps(lanes, values, together):
    """[parts, together] of the lanes' values, -1 for lanes that are not there; no part without any."""
    part = lanes // together
    names, index = np.unique(part, return_inverse=True) if len(lanes) % together else (part[::together], None)
    if index is None and (part.reshape(-1, together) == names[:, None]).all():
        return values.astype(np.int64).reshape(-1, together)
    if index is None:
        names, index = np.unique(part, return_inverse=True)
    table = np.full((len(names), together), _NONE)
    table[index, lanes % together] = values
    return table


def _distinct(table):
    """How many different values a row has, without -1."""
    table = np.sort(table, axis=1)
    new = table[:, 1:] != table[:, :-1]
    return (new & (table[:, 1:] >= 0)).sum(axis=1) + (table[:, 0] >= 0)
