"""Pictures as PNG files, with matplotlib, which is optional: `pip install 'dbrx-quant[plots]'`."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.atomic import write_parts

INK, MUTED, RULE, PAPER = "#1d2433", "#667085", "#dfe3ea", "#ffffff"
MEASURED, PREDICTED, MARKED = "#0b5cad", "#8a94a6", "#c2410c"  # apart for the colour-blind too, and in grey


@dataclass(frozen=True)
class SizePoint:
    """One checkpoint on the error-versus-size picture: bits per weight, KL divergence in nats, its name."""

    bpw: float
    kl: float
    label: str = ""


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, its size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}); install it with: pip install 'dbrx-quant[plots]'"
        ) from None
    return Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, the same bytes every time, and return the path."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, facecolor=PAPER, format="png", metadata={"Software": None})
    write_parts(path, (picture.getvalue(),))
    return path


def dress(axes: Any, title: str = "") -> None:
    """Give axes the look of all our pictures: light rules, no box, the title to the left."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, which="both")
    axes.grid(True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12, parse_math=False)


def error_curve_png(
    points: Sequence[SizePoint],
    path: str | Path,
    *,
    predicted: Sequence[SizePoint] = (),
    title: str = "Error against size",
    marked: str | None = None,
) -> Path:
    """Draw KL divergence over bits per weight, the KL on a logarithmic scale, and return the path.

    Args:
        points: measured checkpoints; joined in order of size, each with its label.
        path: the PNG file to write.
        predicted: what the measurement predicts, drawn as a thin line behind them, its points unnamed.
        title: above the picture.
        marked: label of the points that the picture is about; drawn larger.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or a KL that is not positive.
    """
    measured, expected = (sorted(part, key=lambda point: point.bpw) for part in (points, predicted))
    if not measured and not expected:
        raise ValueError("no points to draw")
    for point in (*measured, *expected):
        if not point.kl > 0:
            raise ValueError(f"{point.label or point.bpw}: a KL divergence of {point.kl} has no logarithm")
    figure = new_figure(7.2, 4.4)
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = figure.add_subplot()
    if expected:
        line = [[point.bpw for point in expected], [point.kl for point in expected]]
        axes.plot(*line, color=PREDICTED, linewidth=1.6, linestyle=(0, (5, 3)), label="predicted")
    if measured:
        line = [[point.bpw for point in measured], [point.kl for point in measured]]
        axes.plot(*line, "o-", color=MEASURED, linewidth=2.2, markersize=6, label="measured")
    for point in measured:
        chosen = marked is not None and point.label == marked
        if chosen:
            axes.plot(point.bpw, point.kl, "D", color=MARKED, markersize=10, zorder=5)
        axes.annotate(
            point.label,
            (point.bpw, point.kl),
            (7, 7),
            textcoords="offset points",
            color=MARKED if chosen else INK,
            fontsize=9,
            fontweight="bold" if chosen else "normal",
            path_effects=[withStroke(linewidth=3, foreground=PAPER)],
            parse_math=False,  # a folder may be named with dollars
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per weight, all overhead counted", color=INK)
    axes.set_ylabel("KL divergence to the original, nats", color=INK)
    axes.margins(x=0.08, y=0.12)
    dress(axes, title)
    if measured and expected:
        axes.legend(frameon=False, labelcolor=INK)
    return save_figure(figure, Path(path))
