"""The sections of the page that compares several checkpoints."""

import math
from collections.abc import Sequence
from typing import Any

from dbrx_quant.quantize.budget.frontier import rescaled
from dbrx_quant.scripts.report.charts import Mark, log_chart
from dbrx_quant.scripts.report.data import BLOCK, BPW, Report, label, measured_kl
from dbrx_quant.scripts.report.heatmaps import Scale, grids, heat_table, key, stripes
from dbrx_quant.scripts.report.marks import MINUS, MISSING, count_text, digits, escape, percent, perplexity
from dbrx_quant.scripts.report.sections import bits_scale, data_table, details, section
from dbrx_quant.scripts.terminal.output import bytes_text

Evaluation = dict[str, Any]


def masthead(reports: Sequence[Report]) -> str:
    """Title and a sentence."""
    smallest, largest = (choose(reports, key=_bytes) for choose in (min, max))
    said = (
        f"{len(reports)} checkpoints, {bytes_text(_bytes(smallest))} to {bytes_text(_bytes(largest))}, "
        f"of {count_text(reports[0]['model']['weights'])} weights."
    )
    scale = bits_scale(*reports)
    strips = (
        f"<div class='strip'><span>{escape(name)}</span>"
        f"{stripes(report, [row[BPW] for row in report['linears']['rows']], scale)}</div>"
        for name, report in zip(names(reports), reports, strict=True)
    )
    return (
        f"<h1>{escape(heading(reports))}</h1>\n<p class='lead'>{escape(said)}</p>\n{''.join(strips)}"
        "<p class='fine'>Each model from its first block to its last, coloured by the bits it got.</p>"
    )


def heading(reports: Sequence[Report]) -> str:
    """`dbrx-instruct at 2.25, 3.00 and 4.00 bits`, or all names where the models differ."""
    model = _one_model(reports)
    if model:
        *sizes, last = (f"{report['headline']['bpw']:.2f}" for report in reports)
        return f"{model.rpartition('/')[2]} at {', '.join(sizes)} and {last} bits"
    return ", ".join(label(report) for report in reports)


def names(reports: Sequence[Report]) -> list[str]:
    """What to call each: by its size where all are of one model."""
    if _one_model(reports):
        return [f"{report['headline']['bpw']:.2f}\N{NO-BREAK SPACE}bpw" for report in reports]
    return [label(report) for report in reports]


def _one_model(reports: Sequence[Report]) -> str | None:
    model = reports[0]["model"]["name"]
    return str(model) if model and all(report["model"]["name"] == model for report in reports) else None


def _bytes(report: Report) -> int:
    return int(report["headline"]["total_bytes"])


def common_text(reports: Sequence[Report]) -> tuple[Any, ...] | None:
    """Text, windows and length that most of them were evaluated on; the most tokens among equals."""
    counts: dict[tuple[Any, ...], int] = {}
    for report in reports:
        for entry in report["evaluations"]:
            counts[_key(entry)] = counts.get(_key(entry), 0) + 1
    return max(counts, key=lambda found: (counts[found], found[1] * found[2]), default=None)


def evaluation_on(report: Report, key: tuple[Any, ...] | None) -> Evaluation | None:
    """A report's evaluation on a text."""
    return next((entry for entry in report["evaluations"] if _key(entry) == key), None)


def _key(entry: Evaluation) -> tuple[Any, ...]:
    return entry["text"], entry["windows"], entry["length"]


def side_by_side(reports: Sequence[Report]) -> str:
    """The numbers of all in one table, a column each."""
    text = common_text(reports)
    found = [evaluation_on(report, text) for report in reports]

    def row(name: str, cells: Sequence[str | None]) -> list[str]:
        return [name, *(MISSING if cell is None else cell for cell in cells)]

    rows = [
        row("bits per weight", [f"{report['headline']['bpw']:.3f}" for report in reports]),
        row("bits of the head", [f"{report['headline']['head_bpw']:.2f}" for report in reports]),
        row("on disk", [bytes_text(_bytes(report)) for report in reports]),
        row("predicted KL, nats", [_digits(report["headline"]["predicted_kl"]) for report in reports]),
        row(
            "KL on held-out rows",
            [_digits((report["headline"]["held_out"] or {}).get("kl")) for report in reports],
        ),
    ]
    if text is not None:
        rows += [
            row("measured KL, nats", [digits(entry["kl"]) if entry else None for entry in found]),
            row("perplexity", [perplexity(entry["ppl"]) if entry else None for entry in found]),
            row("original's", [perplexity(entry["ppl_original"]) if entry else None for entry in found]),
            row("same top token", [percent(entry["top1"]) if entry else None for entry in found]),
            row(
                "same experts",
                [
                    percent(entry["router_topk"]) if entry and entry["router_topk"] is not None else None
                    for entry in found
                ],
            ),
        ]
    said = f"Measured on {text[1]} windows of {text[2]} tokens of {text[0]}." if text else ""
    table = data_table(
        "The checkpoints side by side",
        ["", *names(reports)],
        [row for row in rows if set(row[1:]) != {MISSING}],
    )
    return section("numbers", "Side by side", said, table, wide=True)


def _digits(value: float | None) -> str | None:
    return None if value is None else digits(value)


def curve(reports: Sequence[Report]) -> str:
    """All predicted curves, and every checkpoint's point on them."""
    lines = curves(reports)
    text, marks, cells = common_text(reports), [], []
    for name, report in zip(names(reports), reports, strict=True):
        bpw, kl = report["headline"]["bpw"], report["headline"]["predicted_kl"]
        entry = evaluation_on(report, text)
        measured = (entry["kl"], entry["text"]) if entry else measured_kl(report)
        if kl:
            tip = f"{name}\npredicted {digits(kl)} nats"
            marks.append(Mark(bpw, kl, tip, "predicted", "" if measured else name))
            cells.append([name, f"{bpw:.3f}", "predicted", digits(kl)])
        if measured and measured[0] > 0:
            tip = f"{name}\n{digits(measured[0])} nats on {measured[1]}"
            marks.append(Mark(bpw, measured[0], tip, "measured", name))
            cells.append([name, f"{bpw:.3f}", f"on {measured[1]}", digits(measured[0])])
    if not marks:
        return ""
    joined = sorted((mark.x, mark.y) for mark in marks if mark.style == "measured")
    chart = log_chart(
        "KL divergence against bits per weight, all checkpoints",
        lines,
        marks,
        "bits per weight",
        "KL divergence, nats",
        joined,
    )
    table = data_table("KL divergence by size", ["checkpoint", "bits", "how", "KL, nats"], cells)
    said = "Filled points were measured, hollow ones predicted; a line is the best a measurement knows."
    return section("curve", "Error against size", said, f"<figure>{chart}{details(table)}</figure>")


def curves(reports: Sequence[Report]) -> list[list[tuple[float, float]]]:
    """The curve of each measurement, through all predictions that were made from it."""
    found: list[tuple[list[tuple[float, float]], list[tuple[float, float]]]] = []
    for report in reports:
        line = [(bpw, kl) for bpw, kl in report["curve"] if kl > 0]
        predicted = report["headline"]["predicted_kl"]
        known = [(report["headline"]["bpw"], predicted)] if predicted else []
        same = next((others for other, others in found if line and _same_curve(line, other)), None)
        if same is not None:
            same += known
        elif line:
            found.append((line, known))
    return [rescaled(line, known) for line, known in found]


def _same_curve(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two curves are of one measurement: they end apart, and each goes through its own checkpoint."""
    pairs = list(zip(one, other, strict=False))
    factor = pairs[0][0][1] / pairs[0][1][1]
    return all(a[0] == b[0] and math.isclose(a[1], factor * b[1], rel_tol=1e-9) for a, b in pairs)


def differences(comparison: Report) -> str:
    """For each checkpoint after the first: who got more bits than in the first one, and who fewer."""
    reports, parts = comparison["reports"], []
    columns, called = grids(reports[0]), names(reports)
    inside = [row[BLOCK] is not None for row in reports[0]["linears"]["rows"]]
    for number, found in enumerate(comparison["differences"]):
        name = f"{called[number + 1]} minus {called[0]}"
        if found["bpw"] is None:
            parts.append(f"<h3>{escape(name)}</h3><p>The linears differ: there is nothing to subtract.</p>")
            continue
        values = [value if use else None for value, use in zip(found["bpw"], inside, strict=True)]
        reach = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
        tables = [
            heat_table(
                grid,
                "change",
                "difference in bits",
                values,
                Scale(-reach, reach),
                "{:+.1f}".format,
            )
            for grid in columns
        ]
        keys = key("change", f"{MINUS}{reach:.2f} bits", f"+{reach:.2f}", "no difference")
        parts.append(
            f'<div data-difference="{number}"><h3>{escape(name)}</h3>{keys}'
            f'<div class="maps">{"".join(tables)}</div></div>'
        )
    said = "How many more or fewer bits per weight each one has than the first, matrix by matrix."
    return section("differences", "Differences in bits", said, "".join(parts), wide=True)
