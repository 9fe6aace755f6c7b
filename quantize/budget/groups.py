"""Bits for every run of rows: the best group map at each price of a bit.

Axes: K input channels in packed order, N output channels, U = K / 32 units of rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dbrx_quant.runtime.exl2.format import WIDTHS, Group, GroupMap, group_bits, group_overhead

UNIT = 32
GROUP_ROWS = (32, 64, 128)

Array = npt.NDArray[np.float64]


def water_fill(tables: Mapping[int, Array], n: int, prices: Array) -> list[GroupMap]:
    """For each price of a bit, the group map with the least error + price x bits.

    Args:
        tables: rows of a group → errors [len(WIDTHS), K / rows] of each aligned group at each width.
        n: output channels as stored, N.
        prices: [P] errors per bit.

    A dynamic program over units of 32 rows and the width last used; widths may only fall, groups of more than
    one unit start at multiples of their size. Exact under these rules and additive errors.
    """
    units = tables[UNIT].shape[1]
    widths = len(WIDTHS)
    cost = np.full((units + 1, widths, len(prices)), np.inf)
    cost[0, 0] = 0.0
    came_rows = np.zeros((units + 1, widths, len(prices)), np.int16)  # units of the group that ends here
    came_width = np.zeros((units + 1, widths, len(prices)), np.int8)  # best last width before that group
    bits = {
        rows: np.array([[group_bits(Group(width, rows), n)] for width in WIDTHS], float) for rows in tables
    }
    for unit in range(units):
        best = np.minimum.accumulate(cost[unit], axis=0)
        where = np.zeros((widths, len(prices)), np.int8)
        for width in range(1, widths):
            where[width] = np.where(cost[unit, width] < best[width - 1], width, where[width - 1])
        for rows, table in tables.items():
            span = rows // UNIT
            if unit % span or unit + span > units:
                continue
            reached = best + table[:, unit // span, None] + prices * bits[rows]
            target = cost[unit + span]
            better = reached < target
            target[better] = reached[better]
            came_rows[unit + span][better] = span
            came_width[unit + span][better] = where[better]
    maps = []
    for p in range(len(prices)):
        groups: list[Group] = []
        unit, width = units, int(np.argmin(cost[units, :, p]))
        while unit:
            span = int(came_rows[unit, width, p])
            groups.append(Group(WIDTHS[width], span * UNIT))
            unit, width = unit - span, int(came_width[unit, width, p])
        maps.append(tuple(reversed(groups)))
    return maps


def predicted_error(tables: Mapping[int, Array], groups: Sequence[Group]) -> float:
    """The sum of the table's errors over a group map whose groups are aligned as `water_fill` makes them."""
    start, total = 0, 0.0
    for group in groups:
        total += float(tables[group.rows][WIDTHS.index(group.bits), start // group.rows])
        start += group.rows
    return total


def coarsest_groups(k: int, bits: int) -> GroupMap:
    """K rows at one width with the least overhead that `water_fill` can choose; K a multiple of 32."""
    groups: list[Group] = []
    for rows in sorted(GROUP_ROWS, reverse=True):
        count, k = divmod(k, rows)
        groups += [Group(bits, rows)] * count
    return tuple(groups)


def price_range(tables: Mapping[int, Array], n: int, count: int) -> Array:
    """Prices from "every row at the fewest bits" down to "every row at the most", geometric, [count].

    The first price leaves the least overhead as well: there the largest groups pay, however much finer ones
    would gain.
    """
    errors = tables[UNIT]
    gains = [
        (errors[i + 1] - errors[i]) / ((WIDTHS[i] - WIDTHS[i + 1]) * UNIT * n) for i in range(len(WIDTHS) - 1)
    ]
    positive = np.concatenate(gains)
    positive = positive[positive > 0]
    if not len(positive):
        return np.array([1.0])
    highest = positive.max()
    for rows, table in tables.items():
        whole = errors.shape[1] * UNIT // rows  # groups; a shorter last one is never chosen
        parts = errors[-1, : whole * rows // UNIT].reshape(whole, rows // UNIT).sum(1)
        highest = max(highest, ((table[-1, :whole] - parts) / group_overhead(n)).max())
    return np.geomspace(2 * highest, positive.min() / 2, count)


def lower_hull(points: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the points (bits, error) on the lower convex hull, by rising bits and falling error."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1]))
    hull: list[int] = []
    for i in order:
        if hull and points[i][1] >= points[hull[-1]][1]:
            continue
        while len(hull) >= 2:
            (b0, e0), (b1, e1), (b2, e2) = points[hull[-2]], points[hull[-1]], points[i]
            if (e0 - e1) * (b2 - b1) > (e1 - e2) * (b1 - b0):
                break
            hull.pop()
        hull.append(i)
    return hull
