"""Draws the pictures of docs/how-it-works.md from a conversion of the small DBRX in tests/data.

`python -m dbrx_quant.scripts.dev.plot_how_it_works [--out docs/pictures]`; needs the extra
`plots` and takes about two minutes. Every figure in a picture is measured in that run.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.walk import add_dense_experts, turns
from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.calibration.statistics.shrinkage import hessian
from dbrx_quant.calibration.text.tokens import load_saved, split_held_out
from dbrx_quant.quantize import ConvertOptions, convert
from dbrx_quant.quantize.budget.strategy import STRATEGY_NAME, Outcome, Strategy, read_strategy
from dbrx_quant.quantize.measurement import (
    HEAD,
    MEASUREMENT_NAME,
    LinearMeasurement,
    Measurement,
    read_measurement,
)
from dbrx_quant.quantize.options import target_name
from dbrx_quant.quantize.solve.grid import scale_table, search_group
from dbrx_quant.quantize.solve.ldlq import EFFORTS, Factor, quantize_matrix
from dbrx_quant.quantize.solve.prepare import Prepared, prepare
from dbrx_quant.runtime.exl2.format import uniform_groups
from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

TARGETS = (2.35, 2.5, 2.75, 3.0, 3.5, 4.25)
SHOWN = 3.0  # the target that pictures of one checkpoint show
BLOCK, EXPERT = 1, 12  # the expert whose matrices are looked at
GROUP_ROWS = 64
ROLES = {"w1": "w1 (gate)", "v1": "v1 (up)", "w2": "w2 (down)"}
INK, GREEN, ORANGE, GREY, PALE = "#1e293b", "#0b6e4f", "#c2410c", "#64748b", "#e2e8f0"
COLORS = (GREEN, ORANGE, "#1d4ed8", "#7c3aed")


@dataclass(frozen=True)
class Expert:
    """One matrix of an expert with the second moments of what is routed to it.

    Attributes:
        name: of the linear.
        ordered: [K, N] weight, rows in packed order.
        diagonal: [K] of the Hessian, in that order.
        prepared: order and factor.
        held_out: [K, K] mean of x x^T over tokens that were kept out of calibration, in that order.
    """

    name: str
    ordered: Tensor
    diagonal: Tensor
    prepared: Prepared
    held_out: Tensor


def make_checkpoints(model: Path, work: Path) -> None:
    """Convert the model to all targets; a second call finds everything done."""
    convert(
        ConvertOptions(
            model=model,
            out=work / "out",
            targets=TARGETS,
            calibration="offline",
            rows=64,
            length=256,
            quiet=True,
        )
    )


def finished(work: Path, target: float) -> Path:
    """The folder of a finished target."""
    return work / "out" / target_name(target)


def look_at_expert(model: Path, tokens: Tensor, measurement: Measurement) -> tuple[Expert, Expert]:
    """The gate and the down projection of EXPERT with their Hessians, as the measurement had them."""
    source = StreamedModel(model)
    calibration, held_out = split_held_out(tokens)
    with torch.no_grad():
        states = source.embed(torch.cat([calibration, held_out]))
        for index in range(BLOCK):
            states = _through(source, index, states)
        _, routing = source.block(BLOCK)(states)
    experts = source.architecture.blocks[BLOCK].experts
    assert routing is not None
    assert experts is not None
    turn = list(turns(routing, experts))[EXPERT]
    gate, up, _ = turn.dense(source)
    count = calibration.numel()
    fit, kept_out = turn.part(slice(count)), turn.part(slice(count, None))

    def look(spec: LinearSpec, inputs: Callable[[Tensor], Tensor]) -> Expert:
        moments = {part: Moments.zero(spec.shape[0]) for part in ("own", "others", "held_out")}
        for part, seen in (("own", fit), ("held_out", kept_out)):
            mine = seen.whole()
            moments[part].add(inputs(mine.x), mine.weight.square())
        moments["others"].add(inputs(fit.routing.x[fit.tokens.others]))
        chosen = measurement.linears[spec.name].shrinkage
        matrix = hessian(moments["own"], moments["others"], chosen)
        diagonal = matrix.diagonal().clone()
        prepared = prepare(matrix)
        order = prepared.permutation
        held_out_matrix = moments["held_out"].matrix / moments["held_out"].weight
        ordered = source.dense(spec).T[order].contiguous()
        return Expert(spec.name, ordered, diagonal[order], prepared, held_out_matrix[order][:, order])

    return look(turn.gate, lambda x: x), look(turn.down, lambda x: turn.inner(x, gate, up))


def _through(source: StreamedModel, index: int, states: Tensor) -> Tensor:
    """The states after a whole block, experts included."""
    output, routing = source.block(index)(states)
    experts = source.architecture.blocks[index].experts
    if experts is not None and routing is not None:
        add_dense_experts(output.view(-1, output.shape[-1]), source, experts, routing)
    return output


def rounding_errors(expert: Expert) -> dict[str, list[float]]:
    """Way of rounding → error on tokens kept out, relative to the output's power, at 2, 3 and 4 bits."""
    k = expert.ordered.shape[0]
    alone = Factor(torch.eye(k), expert.diagonal)  # no feedback: every row by itself
    power = float(((expert.held_out @ expert.ordered) * expert.ordered).sum())
    ways: list[tuple[str, Factor, str]] = [("nearest value", alone, "fast")]
    ways += [(f"feedback, effort {effort}", expert.prepared.factor, effort) for effort in EFFORTS]
    found: dict[str, list[float]] = {}
    for label, factor, effort in ways:
        for bits in (2, 3, 4):
            groups = uniform_groups(k, bits, GROUP_ROWS)
            solved = quantize_matrix(expert.ordered, factor, groups, effort=effort)  # type: ignore[arg-type]
            error = expert.ordered - solved.dequantized.float()
            found.setdefault(label, []).append(float(((expert.held_out @ error) * error).sum()) / power)
    return found


def scale_errors(expert: Expert, bits: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Error of a column of the first group over its scale; the stored scales, and the one that is chosen."""
    x, pivots = expert.ordered[:GROUP_ROWS], expert.prepared.factor.pivots[:GROUP_ROWS]
    maximum, codes, _ = search_group(x, bits, pivots)
    stored = scale_table(maximum).float().numpy()
    scales = np.geomspace(stored[2], stored[-1] * 1.1, 400)
    values, half = x[:, column].numpy()[:, None], 1 << (bits - 1)
    rounded = np.clip(np.round(values / scales), -half, half - 1) * scales
    errors = (pivots.numpy()[:, None] * (values - rounded) ** 2).sum(0)
    return scales, errors, stored, int(codes[column])


def draw_order(pyplot: Any, matrices: Sequence[Expert], strategy: Strategy, file: Path) -> None:
    """Variances of the input channels in packed order, what is left of them, and the bits they get."""
    figure, panels = pyplot.subplots(1, 2, figsize=(7.4, 3.5))
    shades = {2: "#f8fafc", 3: "#eef2f7", 4: "#dbe6f0", 5: "#c5d5e4", 6: "#b0c6da", 8: "#9ab5cd"}
    for axes, matrix in zip(panels, matrices, strict=True):
        start, before = 0, 0
        for group in strategy.choices[matrix.name].group_map:
            axes.axvspan(start, start + group.rows, color=shades[group.bits], linewidth=0)
            if group.bits != before:
                place = (start + 2, 0.97)
                axes.text(
                    *place, f"{group.bits} bits", transform=axes.get_xaxis_transform(), va="top", fontsize=9
                )
            start, before = start + group.rows, group.bits
        pivots = matrix.prepared.factor.pivots
        axes.plot(matrix.diagonal, color=GREY, linewidth=1.8, label="variance of the channel")
        axes.plot(pivots, color=GREEN, linewidth=1.4, label="pivot: what later channels\ndo not explain")
        axes.set(xlabel="input channel, in packed order", yscale="log", xlim=(0, start))
        axes.set_ylim(float(pivots.min()) / 3, float(matrix.diagonal.max()) * 2.5)
        axes.set_title(f"expert {EXPERT}, {matrix.name.rpartition('.')[2]}", loc="left", fontsize=10)
        _plain(axes, grid=False)
    panels[0].legend(loc="lower left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110, facecolor="white")


def draw_scales(pyplot: Any, expert: Expert, file: Path) -> None:
    """The error of one column of a group over its scale, with the scales that can be stored."""
    figure, panels = pyplot.subplots(1, 2, figsize=(7.4, 3.1))
    for axes, bits in zip(panels, (2, 4), strict=True):
        scales, errors, stored, chosen = scale_errors(expert, bits, column=5)
        axes.plot(scales, errors / errors.min(), color=GREEN, linewidth=1.8)
        for index, scale in enumerate(stored):
            if scales[0] <= scale <= scales[-1]:
                color = ORANGE if index == chosen else "#cbd5e1"
                axes.axvline(scale, color=color, linewidth=1.6 if index == chosen else 0.9, zorder=0)
        axes.set(ylim=(0.9, 4), xlabel="scale")
        axes.set_title(f"{bits} bits", loc="left", fontsize=10)
    panels[0].set_ylabel("error / least error")
    for axes in panels:
        _plain(axes)
    figure.tight_layout()
    figure.savefig(file, dpi=110, facecolor="white")


def draw_rounding(pyplot: Any, errors: dict[str, list[float]], file: Path) -> None:
    """Error by way of rounding, as bars."""
    figure, axes = _figure(pyplot)
    width = 0.8 / len(errors)
    for index, (label, values) in enumerate(errors.items()):
        at = np.arange(3) + (index - (len(errors) - 1) / 2) * width
        color = (GREY, "#86b8a4", "#3d8f72", GREEN)[index]
        bars = axes.bar(at, [100 * value for value in values], width * 0.92, color=color, label=label)
        axes.bar_label(bars, fmt="{:.2g}", fontsize=8, color=INK, padding=1)
    axes.set_xticks(range(3), ["2 bits", "3 bits", "4 bits"])
    axes.set(ylabel="error of the output, % of its power", yscale="log")
    axes.margins(y=0.15)
    axes.legend(frameon=False, ncols=2, fontsize=9)
    _save(figure, axes, f"block {BLOCK}, expert {EXPERT}, w1: on tokens that were kept out", file)


def draw_curves(pyplot: Any, measurement: Measurement, strategy: Strategy, file: Path) -> None:
    """Error over bits of matrices of one size, the chosen points, and the price as a slope."""
    figure, axes = _figure(pyplot)
    names = _spread_of_experts(measurement)
    weights = measurement.linears[names[0]].weights
    price = _price(measurement, strategy)
    for name, color in zip(names, COLORS, strict=True):
        options = measurement.linears[name].options
        bits = np.array([option.bits for option in options]) / weights
        errors = 1e3 * np.array([option.error for option in options])
        block, expert, matrix = name.split(".")[2], name.split(".")[5], name.split(".")[6]
        axes.plot(bits, errors, color=color, linewidth=1.8, label=f"block {block}, expert {expert}, {matrix}")
        chosen = strategy.choices[name]
        x, y = chosen.bits / weights, 1e3 * chosen.error
        reach = np.array([-0.33, 0.33])
        axes.plot(x + reach, y - 1e3 * price * weights * reach, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.plot(x, y, "o", color=color, markersize=8, markeredgecolor="white", zorder=3)
    axes.set(
        xlim=(2.1, 5.2), ylim=(0, None), xlabel="bits per weight of the matrix", ylabel="error, 0.001 nats"
    )
    axes.legend(frameon=False)
    _save(figure, axes, f"{SHOWN:g} bits per weight on average: one slope for all", file)


def _spread_of_experts(measurement: Measurement) -> list[str]:
    """Four matrices of experts, from one that costs much to one that costs little."""
    experts = {n: e for n, e in measurement.linears.items() if ".experts." in n}
    middle = {n: np.interp(3.0, *_curve(e)) for n, e in experts.items()}
    ranked = sorted(middle, key=lambda name: -middle[name])
    return [ranked[round(share * (len(ranked) - 1))] for share in (0.0, 0.2, 0.55, 1.0)]


def _curve(linear: LinearMeasurement) -> tuple[list[float], list[float]]:
    return [o.bits / linear.weights for o in linear.options], [o.error for o in linear.options]


def _price(measurement: Measurement, strategy: Strategy) -> float:
    """Nats per bit between the last step that was taken and the first that was not."""
    taken, refused = [], []
    for name, chosen in strategy.choices.items():
        options = measurement.linears[name].options
        gains = [(a.error - b.error) / (b.bits - a.bits) for a, b in pairwise(options)]
        at = next(i for i, option in enumerate(options) if option.bits == chosen.bits)
        if name != HEAD:
            taken += gains[at - 1 : at] if at else []
            refused += gains[at : at + 1]
    return float(np.sqrt(np.median(sorted(taken)[:5]) * np.median(sorted(refused)[-5:])))


def draw_bits(pyplot: Any, measurement: Measurement, strategy: Strategy, file: Path) -> None:
    """Bits of every matrix of every expert, with the experts' shares of the tokens above."""
    coverage = measurement.coverage
    shares = np.array([[expert.share for expert in experts] for experts in coverage.values()])
    rows, labels = [], []
    for block in coverage:
        for role, label in ROLES.items():
            stem = f"model.layers.{block}.block_sparse_moe.experts"
            names = [f"{stem}.{expert}.{role}" for expert in range(shares.shape[1])]
            rows.append([strategy.choices[n].bits / measurement.linears[n].weights for n in names])
            labels.append(f"block {block}  {label}")
    figure, (above, axes) = pyplot.subplots(
        2, 1, figsize=(7.4, 4.4), sharex=True, height_ratios=(1, 2.2), layout="constrained"
    )
    places = np.arange(shares.shape[1])
    for index, values in enumerate(shares):
        offset = (index - (len(shares) - 1) / 2) * 0.4
        above.bar(
            places + offset, 100 * values, 0.38, color=(GREEN, ORANGE)[index % 2], label=f"block {index}"
        )
    above.axhline(100 / shares.shape[1], color=GREY, linewidth=1, linestyle=(0, (4, 2)))
    above.set_ylabel("% of routing")
    above.legend(frameon=False, ncols=2, fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.3))
    _plain(above)
    picture = axes.imshow(rows, aspect="auto", cmap="YlGnBu")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(places, places)
    axes.set_xlabel("expert")
    middle = (np.min(rows) + np.max(rows)) / 2
    for y, values in enumerate(rows):
        for x, value in enumerate(values):
            color = "white" if value > middle else INK
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, ax=axes, label="bits per weight", fraction=0.03, pad=0.01)
    figure.savefig(file, dpi=110, facecolor="white")


def draw_sizes(pyplot: Any, results: Sequence[tuple[Strategy, Outcome | None]], file: Path) -> None:
    """KL divergence over bits per weight: predicted, and measured on rows that were kept out."""
    figure, axes = _figure(pyplot)
    bpw = [strategy.bpw for strategy, _ in results]
    measured = [outcome.measured["kl"] for _, outcome in results if outcome and outcome.measured]
    predicted = [strategy.kl for strategy, _ in results]
    axes.plot(bpw, measured, "o-", color=GREEN, linewidth=2, label="measured on rows that were kept out")
    axes.plot(
        bpw, predicted, "s--", color=ORANGE, linewidth=1.4, markersize=4, label="predicted by the measurement"
    )
    axes.set(
        xlabel="bits per weight, all overhead counted", ylabel="KL divergence, nats per token", yscale="log"
    )
    axes.legend(frameon=False)
    _save(figure, axes, "", file)


def _figure(pyplot: Any) -> Any:
    return pyplot.subplots(figsize=(7.4, 3.7))


def _plain(axes: Any, grid: bool = True) -> None:
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if grid:
        axes.grid(True, axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def _save(figure: Any, axes: Any, title: str, file: Path, grid: bool = True) -> None:
    _plain(axes, grid)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    figure.tight_layout()
    figure.savefig(file, dpi=110, facecolor="white")  # white: to be read on a dark page, too


@quiet_on_closed_pipe
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, measure, draw."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/how-it-works.md.")
    parser.add_argument("--model", type=Path, default=root / "tests" / "data" / "tiny-dbrx", help="a DBRX")
    parser.add_argument("--out", type=Path, default=root / "docs" / "pictures", help="where the pictures go")
    parser.add_argument("--work", type=Path, default=root / "build" / "how-it-works", help="for checkpoints")
    options = parser.parse_args(arguments)
    matplotlib = importlib.import_module("matplotlib")  # by name: an optional library, unknown to checkers
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "text.color": INK, "axes.edgecolor": GREY})
    pyplot = importlib.import_module("matplotlib.pyplot")
    make_checkpoints(options.model, options.work)
    shown = finished(options.work, SHOWN)
    measurement, (strategy, _) = (
        read_measurement(shown / MEASUREMENT_NAME),
        read_strategy(shown / STRATEGY_NAME),
    )
    tokens = load_saved(options.work / "out.work" / "tokens.safetensors").input_ids
    gate, down = look_at_expert(options.model, tokens, measurement)
    out = options.out
    draw_order(pyplot, (gate, down), strategy, out / "how-order.png")
    draw_scales(pyplot, gate, out / "how-scales.png")
    draw_rounding(pyplot, rounding_errors(gate), out / "how-rounding.png")
    draw_curves(pyplot, measurement, strategy, out / "how-curves.png")
    draw_bits(pyplot, measurement, strategy, out / "how-bits.png")
    results = [read_strategy(finished(options.work, target) / STRATEGY_NAME) for target in TARGETS]
    draw_sizes(pyplot, results, out / "how-sizes.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
