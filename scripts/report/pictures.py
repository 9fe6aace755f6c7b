"""The report's pictures as PNG files; see `quantize.publish.pictures` for their common look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbrx_quant.quantize.publish.pictures import (
    INK,
    MUTED,
    SizePoint,
    dress,
    error_curve_png,
    new_figure,
    save_figure,
)
from dbrx_quant.scripts.report.comparison import common_text, curves, evaluation_on
from dbrx_quant.scripts.report.data import BPW, ERROR, HEAD_KIND, Report, kinds, label, measured_kl
from dbrx_quant.scripts.report.heatmaps import Grid, grids

_KINDS = ("#41557a", "#d48a1c", "#1f8a7d", "#a84a80", "#9a9484")
Values = Sequence[float | None]


def write_pictures(data: Report, folder: Path) -> list[Path]:
    """Write the pictures of one report, or of several compared, and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    new_figure(1, 1)  # fails before the folder is there
    folder.mkdir(parents=True, exist_ok=True)
    if "reports" in data:
        return _of_several(data, folder)
    rows, columns, title = data["linears"]["rows"], grids(data), label(data)
    bits: Values = [row[BPW] for row in rows]
    found = [_heat(columns, bits, f"{title}: bits per weight", "YlGnBu", folder / "bits.png")]
    errors: Values = [row[ERROR] for row in rows]
    if any(errors):
        found.append(
            _heat(columns, errors, f"{title}: relative error", "YlOrBr", folder / "error.png", log=True)
        )
    if data["coverage"]:
        experts = [grid for grid in columns if grid.across == "expert"][:1]
        tokens: list[float | None] = [None] * len(rows)
        for grid in experts:
            for block, indices in zip(grid.blocks, grid.cells, strict=True):
                for expert, i in enumerate(indices):
                    if i is not None:
                        tokens[i] = data["coverage"][str(block)][expert]
        found.append(
            _heat(
                experts,
                tokens,
                f"{title}: calibration tokens",
                "PuBu",
                folder / "coverage.png",
                name="tokens",
            )
        )
    predicted = _predicted(data)
    point = measured_kl(data)
    if predicted or (point and point[0] > 0):
        points = [SizePoint(data["headline"]["bpw"], point[0], title)] if point and point[0] > 0 else []
        found.append(
            error_curve_png(
                points, folder / "curve.png", predicted=predicted, title="Error against size", marked=title
            )
        )
    if data["block_kl"]:
        found.append(_blocks(data, folder / "blocks.png"))
    if data["bits_bought"]:
        found.append(_bought(data, folder / "bought.png"))
    return found


def _of_several(data: Report, folder: Path) -> list[Path]:
    reports, found = data["reports"], []
    text = common_text(reports)
    points = []
    for report in reports:
        entry = evaluation_on(report, text)
        kl = entry["kl"] if entry else (measured_kl(report) or (0.0, ""))[0]
        if kl > 0:
            points.append(SizePoint(report["headline"]["bpw"], kl, label(report)))
    predicted = [SizePoint(bpw, kl) for bpw, kl in (curves(reports) or [[]])[0]]
    if points or predicted:
        found.append(error_curve_png(points, folder / "curve.png", predicted=predicted))
    columns = grids(reports[0])
    for number, (other, change) in enumerate(zip(reports[1:], data["differences"], strict=True), 1):
        if change["bpw"] is not None:
            title = f"{label(other)} minus {label(reports[0])}: bits per weight"
            path = folder / f"difference-{number}.png"
            found.append(_heat(columns, change["bpw"], title, "PuOr_r", path, centred=True))
    return found


def _predicted(report: Report) -> list[SizePoint]:
    return [SizePoint(bpw, kl) for bpw, kl in report["curve"] if kl > 0]


def _heat(
    columns: Sequence[Grid],
    values: Values,
    title: str,
    colours: str,
    path: Path,
    *,
    log: bool = False,
    centred: bool = False,
    name: str = "",
) -> Path:
    """Heat maps side by side with one scale of colours."""
    from matplotlib.colors import LogNorm, Normalize

    used = [values[i] for grid in columns for row in grid.cells for i in row if i is not None]
    known = [value for value in used if value is not None and (value > 0 or not log)]
    low, high = (-max(map(abs, known)), max(map(abs, known))) if centred else (min(known), max(known))
    if low == high:
        low, high = low - 0.5, high + 0.5
    norm = LogNorm(low, high) if log else Normalize(low, high)
    blocks = len(columns[0].blocks)
    figure = new_figure(1.2 + 0.17 * sum(max(5, len(grid.columns)) for grid in columns), 1.6 + 0.15 * blocks)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold", parse_math=False)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False, width_ratios=_widths(columns))[0]
    image = None
    for axis, grid in zip(axes, columns, strict=True):
        cells = [[_cell(values, i) for i in row] for row in grid.cells]
        image = axis.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(name or grid.title, fontsize=9, color=INK, loc="left")
        axis.tick_params(colors=MUTED, labelsize=7, length=0)
        many = len(grid.columns) > 8
        axis.set_xticks(range(0, len(grid.columns), 5 if many else 1))
        axis.set_xticklabels(grid.columns[:: 5 if many else 1], rotation=0 if many else 60)
        axis.set_xlabel(grid.across if many else "", fontsize=8, color=MUTED)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("block", fontsize=8, color=MUTED)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    bar.outline.set_visible(False)
    return save_figure(figure, path)


def _cell(values: Values, i: int | None) -> float:
    value = None if i is None else values[i]
    return float("nan") if value is None else value


def _widths(columns: Sequence[Grid]) -> list[int]:
    return [max(4, len(grid.columns)) for grid in columns]


def _blocks(report: Report, path: Path) -> Path:
    figure = new_figure(7.2, 4.0)
    axes = figure.add_subplot()
    names = ["head" if block["block"] is None else str(block["block"]) for block in report["block_kl"]]
    _stack(axes, kinds(report), [block["kl"] for block in report["block_kl"]])
    every = max(1, len(names) // 12)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlabel("block", color=INK)
    axes.set_ylabel("predicted KL, nats", color=INK)
    dress(axes, f"{label(report)}: error by block")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    return save_figure(figure, path)


def _bought(report: Report, path: Path) -> Path:
    steps, used = report["bits_bought"], [kind for kind in kinds(report) if kind != HEAD_KIND]
    figure = new_figure(7.2, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    falls = [100 * (1 - step["to_kl"] / step["from_kl"]) for step in steps]
    upper.bar(range(len(steps)), falls, color="#a83d16", width=0.8)
    upper.set_ylabel("error falls by, %", color=INK)
    dress(upper, f"{label(report)}: what each bit bought")
    shared = []
    for step in steps:
        total = sum(step["bits"].values()) or 1
        shared.append({kind: 100 * bits / total for kind, bits in step["bits"].items()})
    _stack(lower, used, shared)
    lower.set_ylabel("who gets them, %", color=INK)
    lower.set_xlabel("bits per weight", color=INK)
    every = max(1, len(steps) // 10)
    lower.set_xticks(range(0, len(steps), every), [f"{step['to_bpw']:.1f}" for step in steps[::every]])
    dress(lower)
    figure.legend(*lower.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    return save_figure(figure, path)


def _stack(axes: Any, used: Sequence[str], bars: Sequence[dict[str, float]]) -> None:
    floor = [0.0] * len(bars)
    for at, kind in enumerate(used):
        heights = [bar.get(kind, 0.0) for bar in bars]
        colour = _KINDS[min(at, len(_KINDS) - 1)]
        axes.bar(range(len(bars)), heights, bottom=floor, color=colour, width=0.8, label=kind)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
