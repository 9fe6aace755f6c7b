"""Heat maps as HTML tables: every cell is a number first and a colour second.

A cell's colour is one of 21 steps between the three anchor colours that the style sheet gives to a kind of
map, so that light and dark need no other markup. Cells carry the index of their linear (`data-i`), under
which the script finds what to tell about it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbrx_quant.scripts.report.data import BLOCK, EXPERT, KIND, Report
from dbrx_quant.scripts.report.marks import MISSING, escape

STEPS = 20

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class Grid:
    """Where the linears of one heat map stand.

    Attributes:
        title: what they have in common.
        across: what a column is.
        columns: names of the columns.
        blocks: the rows.
        cells: for each row the indices of the linears, None where there is none.
    """

    title: str
    across: str
    columns: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Scale:
    """From values to steps of colour, linear or logarithmic, `low` to `high`."""

    low: float
    high: float
    logarithmic: bool = False

    def step(self, value: float) -> int:
        """The step, 0 to STEPS; what lies outside goes to the ends."""
        if self.high <= self.low or (self.logarithmic and value <= 0):
            return 0 if value <= self.low else STEPS
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(STEPS * min(max(share, 0.0), 1.0))


def grids(report: Report) -> list[Grid]:
    """One grid block × expert for each matrix of experts, and one block × projection for the others."""
    rows = report["linears"]["rows"]
    blocks = tuple(dict.fromkeys(row[BLOCK] for row in rows if row[BLOCK] is not None))
    experts: dict[str, dict[tuple[int, Any], int]] = {}
    others: dict[tuple[int, Any], int] = {}
    for i, row in enumerate(rows):
        if row[EXPERT] is not None:
            experts.setdefault(row[KIND], {})[row[BLOCK], row[EXPERT]] = i
        elif row[BLOCK] is not None:
            others[row[BLOCK], row[KIND]] = i
    found = [_grid(kind, "expert", blocks, places) for kind, places in experts.items()]
    if others:
        title = "projections"
        if experts:
            title = "attention" if {kind for _, kind in others} <= _ATTENTION else "outside experts"
        found.append(_grid(title, "projection", blocks, others))
    return found


def _grid(title: str, across: str, blocks: tuple[int, ...], places: Mapping[tuple[int, Any], int]) -> Grid:
    columns = tuple(dict.fromkeys(column for _, column in places))
    if across == "expert":
        columns = tuple(sorted(columns))
    cells = tuple(tuple(places.get((block, column)) for column in columns) for block in blocks)
    return Grid(title, across, tuple(str(column).removesuffix("_proj") for column in columns), blocks, cells)


def heat_table(
    grid: Grid,
    kind: str,
    what: str,
    values: Sequence[float | None],
    scale: Scale,
    text: Callable[[float], str],
) -> str:
    """One heat map.

    Args:
        grid: its cells.
        kind: of colours: bits, error, tokens or change.
        what: it shows.
        values: linear → value; None: not known.
        scale: of the colours.
        text: what a cell says.
    """
    rest = f'<span class="unseen"> {escape(what)} by block and {grid.across}</span>'
    lines = [
        f'<div class="map" style="--columns:{len(grid.columns)}">',
        f'<table class="heat {kind}{" roomy" if len(grid.columns) <= 8 else ""}" role="grid" '
        f'aria-readonly="true" style="--rows:{len(grid.blocks)}">',
        f"<caption>{escape(grid.title)}{rest}</caption>",
        f'<thead><tr><th scope="col"><span class="unseen">block</span></th>{_heads(grid)}</tr></thead>',
        "<tbody>",
    ]
    for block, indices in zip(grid.blocks, grid.cells, strict=True):
        sparse = len(grid.blocks) > 20 and block % 5
        number = f'<span class="{"quiet" if sparse else "shown"}">{block}</span>'
        cells = [_cell(i, values, scale, text) for i in indices]
        lines.append(
            f'<tr><th scope="row"><span class="unseen">block </span>{number}</th>{"".join(cells)}</tr>'
        )
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _heads(grid: Grid) -> str:
    unseen = f'<span class="unseen">{grid.across} </span>'
    return "".join(f'<th scope="col">{unseen}{escape(column)}</th>' for column in grid.columns)


def _cell(i: int | None, values: Sequence[float | None], scale: Scale, text: Callable[[float], str]) -> str:
    value = None if i is None else values[i]
    if value is None:
        return f'<td class="none"><b>{MISSING}</b></td>'
    return f'<td class="s{scale.step(value)}" data-i="{i}"><b>{escape(text(value))}</b></td>'


def key(kind: str, low: str, high: str, middle: str = "") -> str:
    """The key of a heat map's colours."""
    return (
        f'<p class="key {kind}"><span>{escape(low)}</span><i aria-hidden="true"></i>'
        f"<span>{escape(middle)}</span><span>{escape(high)}</span></p>"
    )


def stripes(report: Report, values: Sequence[float], scale: Scale) -> str:
    """The model as one line of stripes, an expert (or a projection) each, block after block."""
    groups: dict[tuple[Any, Any], list[float]] = {}
    for i, row in enumerate(report["linears"]["rows"]):
        if row[BLOCK] is not None:
            groups.setdefault((row[BLOCK], row[KIND] if row[EXPERT] is None else row[EXPERT]), []).append(
                values[i]
            )
    blocks: dict[Any, list[float]] = {}
    for (block, _), members in groups.items():
        blocks.setdefault(block, []).append(sum(members) / len(members))
    parts, x = [], 0.0
    for means in blocks.values():
        for mean in means:
            parts.append(f'<rect class="s{scale.step(mean)}" x="{x:g}" width="1.04" height="10"/>')
            x += 1
        x += 0.6
    return (
        f'<svg class="stripes bits" viewBox="0 0 {x - 0.6:g} 10" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )
