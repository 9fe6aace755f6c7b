"""Charts as inline SVG: drawn here, coloured by the style sheet, each mark reachable by keyboard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dbrx_quant.scripts.report.marks import digits, escape

WIDTH, HEIGHT = 600, 380
_UNITS = (("nats", 1.0), ("thousandths of a nat", 1e-3), ("millionths of a nat", 1e-6))
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 40, 52
_LINE = 17  # height of a name beside a mark


@dataclass(frozen=True)
class Mark:
    """A point to look at: place, what its tooltip says, and its shape (predicted, measured or this)."""

    x: float
    y: float
    tip: str
    style: str
    text: str = ""


def log_chart(
    name: str,
    lines: Sequence[Sequence[Sequence[float]]],
    marks: Sequence[Mark],
    x_title: str,
    y_title: str,
    joined: Sequence[Sequence[float]] = (),
) -> str:
    """Lines and marks over a linear x and a logarithmic y.

    Args:
        name: of the picture, for screen readers.
        lines: points (x, y) each; y positive.
        marks: drawn over them.
        x_title: of the x axis.
        y_title: of the y axis.
        joined: points that a thin line connects.
    """
    points = [(x, y) for line in lines for x, y in line] + [(mark.x, mark.y) for mark in marks]
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    room = 0.05 * (high_x - low_x) or 0.5
    low_x, high_x = low_x - room, high_x + room
    low_y, high_y = min(p[1] for p in points) / 1.25, max(p[1] for p in points) * 1.25

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_open(name)]
    for value in log_ticks(low_y, high_y):
        _, y = place(low_x, value)
        parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y:.1f}">{tick_text(value)}</text>')
    for value in linear_ticks(low_x, high_x):
        x, _ = place(value, low_y)
        parts.append(f'<path class="rule" d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}">{value:g}</text>')
    parts.append(f'<text class="x title" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}">{escape(x_title)}</text>')
    parts.append(f'<text class="title" x="0" y="18">{escape(y_title)}</text>')
    for style, line in [(f"l{i % 4}", line) for i, line in enumerate(lines)] + [("joined", joined)]:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
    taken: list[tuple[float, float, float]] = []  # from, to, y of the names so far
    for mark in sorted(marks, key=lambda mark: mark.y):  # from the lowest up
        parts.append(_mark(mark, *place(mark.x, mark.y), taken))
    return "".join([*parts, "</svg>"])


def stacked_bars(
    name: str, bars: Mapping[str, Mapping[str, float]], kinds: Sequence[str], y_title: str
) -> str:
    """Bars of parts one above the other.

    Args:
        name: of the picture, for screen readers.
        bars: label of a bar → kind → height.
        kinds: all kinds, in the order of their colours.
        y_title: of the y axis.
    """
    highest = max(sum(bar.values()) for bar in bars.values()) or 1.0
    unit, size = next((unit, size) for unit, size in _UNITS if highest >= size or size == _UNITS[-1][1])
    step = (WIDTH - _LEFT - _RIGHT) / len(bars)
    floor, scale = HEIGHT - _BOTTOM, (HEIGHT - _TOP - _BOTTOM) / highest
    parts = [_open(name)]
    for value in linear_ticks(0, highest):
        y = floor - value * scale
        parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y:.1f}">{tick_text(value / size)}</text>')
    every = math.ceil(len(bars) / 12)
    for i, (label, bar) in enumerate(bars.items()):
        x, y = _LEFT + i * step, float(floor)
        said = [f"{label}: {digits(sum(bar.values()))} nats"]
        said += [f"{kind}: {digits(bar[kind])}" for kind in kinds if kind in bar]
        parts.append(_open_group("\n".join(said)))
        for at, kind in enumerate(kinds):
            height = bar.get(kind, 0.0) * scale
            y -= height
            parts.append(
                f'<rect class="k{at}" x="{x + 0.12 * step:.1f}" y="{y:.1f}" '
                f'width="{0.76 * step:.1f}" height="{height:.1f}"/>'
            )
        parts.append(
            f'<rect class="aim" x="{x:.1f}" y="{_TOP}" width="{step:.1f}" height="{floor - _TOP}"/></g>'
        )
        if i % every == 0 or (label == "head" and (i - 1) % every):
            text = label.removeprefix("block ")
            parts.append(f'<text class="x" x="{x + step / 2:.1f}" y="{floor + 20}">{escape(text)}</text>')
    parts.append(f'<text class="x title" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}">block</text>')
    parts.append(f'<text class="title" x="0" y="18">{escape(y_title)}, {unit}</text>')
    return "".join([*parts, "</svg>"])


def shares(parts: Mapping[str, float], kinds: Sequence[str]) -> str:
    """One bar of shares that add up to its whole width, named for screen readers by its parts."""
    total = sum(parts.values()) or 1.0
    said = ", ".join(f"{kind} {100 * parts[kind] / total:.0f} %" for kind in kinds if kind in parts)
    spans = [
        f'<i class="k{at}" style="width:{100 * parts[kind] / total:.1f}%"></i>'
        for at, kind in enumerate(kinds)
        if kind in parts
    ]
    return (
        f'<span class="shares" role="img" aria-label="{escape(said)}" '
        f'data-tip="{escape(said)}">{"".join(spans)}</span>'
    )


def legend(kinds: Sequence[str]) -> str:
    """Names of the colours of kinds."""
    items = (f'<li><i class="k{at}"></i>{escape(kind)}</li>' for at, kind in enumerate(kinds))
    return f'<ul class="legend">{"".join(items)}</ul>'


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the limits; the powers alone where that is too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1,)):
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 9:
            break
    return found


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers within the limits, four to nine of them."""
    raw = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short: 0.005, 20, 1e-06."""
    return f"{value:g}"


def _open(name: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-roledescription="chart" '
        f'aria-label="{escape(name)}">'
    )


def _open_group(tip: str) -> str:
    said = escape(tip)
    return f'<g class="mark" role="img" aria-label="{said}" data-tip="{said}">'


def _mark(mark: Mark, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    shape = {
        "this": f'<path d="M{x:.1f} {y - 9:.1f}l9 9-9 9-9-9z"/>',
        "measured": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>',
        "predicted": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
    }[mark.style]
    label = ""
    if mark.text:
        width = 11 * len(mark.text)  # as wide as its letters are on a phone
        late = x + 12 + width > WIDTH
        start, at = (x - 12 - width if late else x + 12), y - 8
        for other_start, other_end, other in taken:
            if start < other_end and other_start < start + width and abs(at - other) < _LINE:
                at = other - _LINE
        taken.append((start, start + width, at))
        style = "name late" if late else "name"
        beside = x - 12 if late else x + 12
        label = f'<text class="{style}" x="{beside:.1f}" y="{at:.1f}">{escape(mark.text)}</text>'
    return (
        f'{_open_group(mark.tip)}<circle class="aim" cx="{x:.1f}" cy="{y:.1f}" r="14"/>'
        f'<g class="{mark.style}">{shape}</g>{label}</g>'
    )
