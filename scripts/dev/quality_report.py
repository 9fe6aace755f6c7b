"""The quality benchmark's figures beside those of other tools: comparisons, tables, pictures."""

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.terminal.output import print_table

Point = tuple[float, float]
Row = Mapping[str, Any]
LABELS = {"llamacpp": "llama.cpp i-quants"}  # of what is drawn as a tool's curve
Peers = Mapping[str, Sequence[Mapping[str, Any]]]  # tool → its sizes: bpw, kl, ppl, top1, for llama.cpp type


def interpolate(points: Sequence[Point], x: float) -> tuple[float, bool]:
    """The straight line through the points on both sides of x, and whether x lies outside of all of them.

    Outside, the line through the two last points on that side goes on.

    Raises:
        ValueError: fewer than two points, or two at the same place.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or any(a[0] == b[0] for a, b in pairwise(ordered)):
        raise ValueError(f"expected two or more points at different places, got {ordered}")
    after = min(max(sum(point[0] < x for point in ordered), 1), len(ordered) - 1)
    (x0, y0), (x1, y1) = ordered[after - 1], ordered[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0), not ordered[0][0] <= x <= ordered[-1][0]


def divergence_at(sizes: Sequence[Row], bpw: float) -> tuple[float, bool]:
    """A tool's KL divergence at any size, its logarithm a straight line from size to size.

    Whether it lies outside of the sizes comes second; less than a hundredth of a bit does not count.
    """
    points = [(row["bpw"], math.log(row["kl"])) for row in sizes]
    value, outside = interpolate(points, bpw)
    return math.exp(value), outside and min(abs(bpw - point[0]) for point in points) > 0.01


def equivalent_bits(sizes: Sequence[Row], bpw: float, kl: float) -> tuple[float, bool]:
    """How many more bits per weight a tool needs for the KL divergence `kl` that we reach with `bpw`."""
    value, outside = interpolate([(math.log(row["kl"]), row["bpw"]) for row in sizes], math.log(kl))
    return value - bpw, outside


def rivals(peers: Peers) -> dict[str, Sequence[Row]]:
    """Tools with a curve to compare with; of llama.cpp's types the i-quants, its best at each size."""
    named = {
        tool: [row for row in rows if str(row.get("type", "IQ")).startswith("IQ")]
        for tool, rows in peers.items()
    }
    return {tool: rows for tool, rows in named.items() if len(rows) > 1}


def compare(row: Row, peers: Peers) -> dict[str, Any]:
    """A size of ours against each rival: its KL at equal bits, our share of it, the bits it needs more.

    Returns:
        tool → kl, ratio, bits, extrapolated (whether the tool has no size near).
    """
    result = {}
    for tool, sizes in rivals(peers).items():
        theirs, outside = divergence_at(sizes, row["bpw"])
        bits, beyond = equivalent_bits(sizes, row["bpw"], row["kl"])
        result[tool] = {
            "kl": theirs, "ratio": row["kl"] / theirs, "bits": bits,
            "kl_extrapolated": outside, "bits_extrapolated": beyond,
        }  # fmt: skip
    return result


def size_cells(rows: Sequence[Row], peers: Peers) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of sizes; `~` marks what lies outside of a peer's sizes."""
    head = ["target", "bpw", "KL", "± se", "perplexity", "top-1", "predicted KL", "predicted/KL"]
    for tool in rivals(peers):
        head += [f"{LABELS.get(tool, tool)}: KL", "ratio", "bits ahead"]
    cells = []
    for row in rows:
        line = [
            f"{row['target']}", f"{row['bpw']:.4f}", number(row["kl"]), number(row["kl_stderr"]),
            f"{row['ppl']:.3f}", f"{row['top1']:.4f}", number(row["predicted_kl"]),
            f"{row['predicted_kl'] / row['kl']:.2f}",
        ]  # fmt: skip
        for other in compare(row, peers).values():
            line.append(("~" if other["kl_extrapolated"] else "") + number(other["kl"]))
            line.append(f"{other['ratio']:.2f}")
            line.append(("~" if other["bits_extrapolated"] else "") + f"{other['bits']:+.2f}")
        cells.append(line)
    return head, cells


def study_cells(rows: Sequence[Row], base: str) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a study: KL of each variant at each target, and its ratio to the base's."""
    targets = sorted({row["target"] for row in rows})
    found = {(row["variant"], row["target"]): row for row in rows}
    head = ["variant"]
    for target in targets:
        head += [f"KL at {target}", f"to {base}"]
    head += ["measuring", "quantizing"]
    cells = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        line, mine = [variant], [row for row in rows if row["variant"] == variant]
        for target in targets:
            row, reference = found.get((variant, target)), found.get((base, target))
            line.append(number(row["kl"]) if row else "-")
            line.append(f"{row['kl'] / reference['kl']:.3f}" if row and reference else "-")
        quantizing = sum(row["quantize"]["cpu"] for row in mine) / len(mine)
        cells.append([*line, f"{mine[0]['measure']['cpu']:.0f} s", f"{quantizing:.0f} s"])
    return head, cells


def prediction_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the study of predictions: means over the parts left out, and each part's ratio."""
    head = ["target", "predicted KL", "held-out rows", "predicted/measured", "of each part"]
    cells = []
    for target in sorted({row["target"] for row in rows}):
        pairs = [(r["predicted_kl"], r["unseen"]["kl"]) for r in rows if r["target"] == target]
        predicted, measured = (statistics.mean(side) for side in zip(*pairs, strict=True))
        each = " ".join(f"{p / m:.2f}" for p, m in pairs)
        cells.append([f"{target}", number(predicted), number(measured), f"{predicted / measured:.2f}", each])
    return head, cells


def number(value: float | None) -> str:
    """Four digits, never in powers of ten: 0.3792, 0.0008571."""
    if not value:
        return "-"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def show(report: Mapping[str, Any], peers: Peers, markdown: bool) -> None:
    """The report's tables on stdout."""
    for study, rows in report["studies"].items():
        if not rows:
            continue
        if study == "sizes":
            title, note = f"{report['name']}: sizes, on the test text", ""
            head, cells = size_cells(rows, peers)
        elif study == "prediction":
            title, note = f"{report['name']}: prediction, on held-out calibration rows", ""
            head, cells = prediction_cells(rows)
        else:
            title, note = (
                f"{report['name']}: {study}, on the held-out text",
                "processor seconds, of all cores",
            )
            head, cells = study_cells(rows, "ours" if study != "calibration" else rows[0]["variant"])
        if markdown:
            print(f"{title}\n")
            for line in (head, ["---"] + ["---:"] * (len(head) - 1), *cells):
                print(f"| {' | '.join(line)} |")
            print(f"\n{note}\n")
        else:
            print_table(title, head, cells, note=note)


def plot(report: Mapping[str, Any], peers: Peers, file: Path) -> None:
    """KL divergence over bits per weight, ours and the peers', as a picture; needs matplotlib."""
    matplotlib = importlib.import_module("matplotlib")  # by name: an optional library, unknown to checkers
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6))

    def name(text: str, point: Point, offset: Point, **style: Any) -> None:
        axes.annotate(text, point, offset, textcoords="offset points", **style)

    ours = sorted((row["bpw"], row["kl"]) for row in report["studies"]["sizes"])
    curves = {"dbrx-quant": ours, **{t: [(r["bpw"], r["kl"]) for r in s] for t, s in rivals(peers).items()}}
    colors = ("#0b6e4f", "#c2410c", "#475569")
    for (tool, points), color in zip(curves.items(), colors, strict=False):
        width = 2.4 if tool == "dbrx-quant" else 1.6
        axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=width, markersize=5)
        name(LABELS.get(tool, tool), points[-1], (8, -12), color=color, fontweight="bold")
    for row in peers.get("llamacpp", ()):
        if not row["type"].startswith("IQ"):  # not on the curve
            axes.plot(row["bpw"], row["kl"], "x", color=colors[2], markersize=6)
        name(row["type"], (row["bpw"], row["kl"]), (4, 5), color=colors[2], fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="bits per weight, all overhead counted", ylabel="KL divergence to the original, nats")
    axes.set_title(f"{report['name']}, WikiText-2 test", loc="left")
    axes.grid(True, which="both", color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.yaxis.set_minor_formatter("")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=150, facecolor="white")
