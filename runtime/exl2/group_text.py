"""Group maps as text, as measurements, strategies and reports have them."""

from collections.abc import Sequence
from itertools import groupby

from dbrx_quant.runtime.exl2.format import Group, GroupMap


def render_groups(groups: Sequence[Group]) -> str:
    """A group map as text: `4:64x2 3:32` is two 4-bit groups of 64 rows, then a 3-bit group of 32."""
    parts = []
    for group, run in groupby(groups):
        count = len(list(run))
        parts.append(f"{group.bits}:{group.rows}" + (f"x{count}" if count > 1 else ""))
    return " ".join(parts)


def parse_groups(text: str) -> GroupMap:
    """The group map that `render_groups` wrote.

    Raises:
        ValueError: the text is not of that form.
    """
    groups: list[Group] = []
    for part in text.split():
        try:
            bits, rest = part.split(":")
            rows, _, count = rest.partition("x")
            groups += [Group(int(bits), int(rows))] * int(count or 1)
        except ValueError:
            raise ValueError(f"{part!r} is not of the form bits:rows or bits:rowsxcount") from None
    return tuple(groups)
