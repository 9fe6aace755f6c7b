"""The sections of the page about one checkpoint, each a piece of HTML; empty where nothing is known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dbrx_quant.scripts.report.charts import Mark, legend, log_chart, shares, stacked_bars
from dbrx_quant.scripts.report.data import (
    BLOCK,
    BPW,
    ERROR,
    EXPERT,
    HEAD_KIND,
    KIND,
    TOKENS,
    Report,
    kinds,
    label,
    measured_kl,
)
from dbrx_quant.scripts.report.heatmaps import Grid, Scale, grids, heat_table, key, stripes
from dbrx_quant.scripts.report.marks import (
    MINUS,
    MISSING,
    TIMES,
    count_text,
    digits,
    escape,
    percent,
    perplexity,
)
from dbrx_quant.scripts.terminal.output import bytes_text


def masthead(report: Report) -> str:
    """Title, a one-sentence summary, and the model as a line of stripes."""
    model, headline = report["model"], report["headline"]
    blocks = f"{model['blocks']} blocks"
    if model["experts"]:
        blocks += f" of {model['experts']} experts"
    said = (
        f"{count_text(model['weights'])} weights in {blocks}, at {headline['bpw']:.2f} bits each: "
        f"{bytes_text(headline['total_bytes'])} in all."
    )
    measured = measured_kl(report)
    if measured:
        said += f" KL divergence from the original: {digits(measured[0])} nats a token on {measured[1]}."
    values = [row[BPW] for row in report["linears"]["rows"]]
    one = "an expert" if model["experts"] else "a projection"
    return (
        f"<h1>{escape(label(report))}</h1>\n<p class='lead'>{escape(said)}</p>\n"
        f"{stripes(report, values, bits_scale(report))}\n"
        f"<p class='fine'>The model from its first block to its last: a stripe is {one}, "
        "its colour the bits it got.</p>"
    )


def tiles(report: Report) -> str:
    """The headline numbers."""
    headline = report["headline"]
    found = [
        ("Bits per weight", f"{headline['bpw']:.3f}", f"head {headline['head_bpw']:.2f}"),
        ("On disk", bytes_text(headline["total_bytes"]), f"{report['model']['family']}, EXL2"),
    ]
    best = max(report["evaluations"], key=lambda entry: entry["tokens"], default=None)
    held = headline["held_out"]
    predicted = headline["predicted_kl"]
    expected = f"predicted {digits(predicted)}" if predicted is not None else ""
    if best or held:
        entry = best or {**held, "ppl_original": held["reference_ppl"]}
        error = f"± {digits(entry['kl_stderr'], 1)}, " if entry["kl_stderr"] is not None else ""
        found += [
            ("KL divergence, nats", digits(entry["kl"]), f"{error}{expected}".removesuffix(", ")),
            ("Perplexity", perplexity(entry["ppl"]), f"original {perplexity(entry['ppl_original'])}"),
            ("Same top token", percent(entry["top1"]), f"on {entry['text']}"),
        ]
        routed = entry.get("router_topk")  # the conversion itself does not follow the routing
        if isinstance(routed, Sequence):
            routed = sum(routed) / len(routed) if routed else None
        if routed is not None:
            found.append(("Same experts", percent(routed), "of the router's choices"))
    elif predicted is not None:
        found.append(("KL divergence, nats", digits(predicted), "predicted; not evaluated yet"))
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in found
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def heat_maps(report: Report) -> str:
    """Bits and relative errors, one above the other; two radio buttons choose, without any script."""
    rows, columns = report["linears"]["rows"], grids(report)
    bits = [row[BPW] for row in rows]
    scale = bits_scale(report)
    maps = [_maps(columns, "bits", "bits per weight", bits, scale, "{:.2f}".format)]
    keys = [key("bits", f"{scale.low:g} bits", f"{scale.high:g} bits a weight")]
    names = ["Bits per weight"]
    errors = [row[ERROR] if row[BLOCK] is not None else None for row in rows]
    known = [error for error in errors if error]
    if known:
        reach = Scale(min(known), max(known), logarithmic=True)
        maps.append(_maps(columns, "error", "relative error in percent", errors, reach, _hundredths))
        keys.append(key("error", percent(reach.low), f"{percent(reach.high)} of the output's energy"))
        names.append("Relative error")
    radios = "".join(
        f'<input type="radio" name="heat" id="heat{i}"{" checked" if not i else ""}>'
        f'<label for="heat{i}">{name}</label>'
        for i, name in enumerate(names)
    )
    panes = "".join(f'<div class="pane p{i}">{keys[i]}{pane}</div>' for i, pane in enumerate(maps))
    how = {
        "measured": "Errors are those of the finished weights on the calibration text.",
        "predicted": "Errors are the measurement's predictions.",
        None: "",
    }[report["errors"]]
    return section(
        "bits",
        "Where the bits went",
        f"{_bits_said(report)} {how}",
        '<fieldset class="switch"><legend class="unseen">What the maps show</legend>'
        f"{radios}{panes}</fieldset>",
        wide=True,
    )


def _hundredths(share: float) -> str:
    return digits(100 * share, 2)


def _maps(
    columns: Sequence[Grid], kind: str, what: str, values: Sequence[float | None], scale: Scale, text: Any
) -> str:
    tables = [heat_table(grid, kind, what, values, scale, text) for grid in columns]
    return f'<div class="maps">{"".join(tables)}</div>'


def bits_scale(*reports: Report) -> Scale:
    """From the fewest to the most bits of the decoders' linears, to half bits outward."""
    bits = [row[BPW] for report in reports for row in report["linears"]["rows"] if row[BLOCK] is not None]
    return Scale(math.floor(2 * min(bits)) / 2, math.ceil(2 * max(bits)) / 2)


def _bits_said(report: Report) -> str:
    """A sentence on who got the most bits and who the fewest."""
    rows = [row for row in report["linears"]["rows"] if row[BLOCK] is not None]
    most, fewest = max(rows, key=lambda row: row[BPW]), min(rows, key=lambda row: row[BPW])
    said = (
        f"Most bits a weight went to {_place(most)} ({most[BPW]:.2f}), fewest to {_place(fewest)} "
        f"({fewest[BPW]:.2f})."
    )
    seen = sorted(
        (row for row in rows if row[EXPERT] is not None and row[TOKENS] is not None), key=lambda r: r[TOKENS]
    )
    quarter = len(seen) // 4
    if quarter:
        busy, idle = (sum(row[BPW] for row in part) / quarter for part in (seen[-quarter:], seen[:quarter]))
        said += f" The busiest quarter of the experts has {busy:.2f} on average, the idlest {idle:.2f}."
    return said


def _place(row: Sequence[Any]) -> str:
    expert = f", expert {row[EXPERT]}" if row[EXPERT] is not None else ""
    return f"{row[KIND].removesuffix('_proj')} of block {row[BLOCK]}{expert}"


def coverage(report: Report) -> str:
    """How many calibration tokens the router sent to each expert."""
    if not report["coverage"]:
        return ""
    rows = report["linears"]["rows"]
    first = next((grid for grid in grids(report) if grid.across == "expert"), None)
    if first is None:
        return ""
    tokens: list[float | None] = [None] * len(rows)
    for block, indices in zip(first.blocks, first.cells, strict=True):
        for expert, i in enumerate(indices):
            if i is not None:
                tokens[i] = report["coverage"].get(str(block), [])[expert]
    known = sorted(count for count in tokens if count is not None)
    scale = Scale(next((c for c in known if c), 1), max(2, known[-1]), logarithmic=True)
    missed = sum(count == 0 for count in known)
    said = (
        f"The router sent {int(known[0]):,} tokens to the least visited expert and {int(known[-1]):,} to the "
        f"most visited one, of {report['calibration']['tokens'] or 0:,} in all. "
    )
    said += (
        f"{missed} {'expert' if missed == 1 else 'experts'} saw none: quantized on the block's other tokens."
        if missed
        else "Every expert saw some; those with few lean on their block's other tokens."
    )
    table = heat_table(
        replace(first, title="calibration tokens"),
        "tokens",
        "the router's choices",
        tokens,
        scale,
        lambda count: f"{count:,.0f}",
    )
    keys = key("tokens", f"{int(known[0]):,} tokens", f"{int(known[-1]):,}")
    return section(
        "coverage", "Who saw the calibration text", said, f'{keys}<div class="alone">{table}</div>'
    )


def curve(report: Report) -> str:
    """Predicted KL over bits per weight, with this checkpoint and what was measured of it."""
    headline, line = report["headline"], [point for point in report["curve"] if point[1] > 0]
    bpw, marks, cells = headline["bpw"], [], []
    if headline["predicted_kl"]:
        kl = headline["predicted_kl"]
        marks.append(Mark(bpw, kl, f"this checkpoint\n{bpw:.3f} bits, predicted {digits(kl)} nats", "this"))
        cells.append(["predicted, this checkpoint", f"{bpw:.3f}", digits(kl)])
    measured = [(entry["text"], entry["kl"]) for entry in report["evaluations"]]
    if headline["held_out"]:
        measured.append((headline["held_out"]["text"], headline["held_out"]["kl"]))
    called: set[str] = set()
    for text, kl in measured:
        if kl > 0:
            tip = f"measured on {text}\n{bpw:.3f} bits, {digits(kl)} nats"
            named = text if text not in called else ""  # a text of several lengths is named once
            called.add(text)
            marks.append(Mark(bpw, kl, tip, "measured", named))
            cells.append([f"measured on {text}", f"{bpw:.3f}", digits(kl)])
    if not line or not marks:
        return ""
    chart = log_chart(
        "KL divergence against bits per weight", [line], marks, "bits per weight", "KL divergence, nats"
    )
    cells += [["predicted", f"{x:.3f}", digits(y)] for x, y in line]
    said = "Each point on the line is the best that this measurement knows for that size."
    if measured and headline["predicted_kl"]:
        ratio = measured[0][1] / headline["predicted_kl"]
        said += f" What was measured here is {digits(ratio, 2)} times the prediction."
    table = data_table("KL divergence by size", ["what", "bits per weight", "KL, nats"], cells)
    return section("curve", "Error against size", said, f"<figure>{chart}{details(table)}</figure>")


def block_errors(report: Report) -> str:
    """Predicted nats of each block."""
    bars = {
        "head" if block["block"] is None else f"block {block['block']}": block["kl"]
        for block in report["block_kl"]
    }
    if not bars:
        return ""
    used = kinds(report)
    chart = stacked_bars("Predicted KL divergence of each block", bars, used, "predicted KL")
    totals = {label: sum(bar.values()) for label, bar in bars.items()}
    worst = max(totals, key=lambda label: totals[label])
    share = totals[worst] / (sum(totals.values()) or 1.0)
    who = "The head" if worst == "head" else worst.capitalize()
    said = f"{who} alone adds {100 * share:.0f} % of the predicted error."
    cells = [
        [name, *(digits(bar[kind]) if kind in bar else MISSING for kind in used), digits(totals[name])]
        for name, bar in bars.items()
    ]
    table = data_table("Predicted KL by block, nats", ["", *used, "all"], cells)
    return section(
        "blocks", "Error by block", said, f"<figure>{legend(used)}{chart}{details(table)}</figure>"
    )


def bits_bought(report: Report) -> str:
    """How the KL falls with each further tenth of a bit, and which kinds of matrices got them."""
    steps = [step for step in report["bits_bought"] if step["from_kl"] > 0]
    if not steps:
        return ""
    used, bpw = [kind for kind in kinds(report) if kind != HEAD_KIND], report["headline"]["bpw"]
    reached = min(range(len(steps)), key=lambda i: abs(steps[i]["to_bpw"] - bpw))
    lines, steepest = [], max(1 - step["to_kl"] / step["from_kl"] for step in steps) or 1.0
    for i, step in enumerate(steps):
        fall = 1 - step["to_kl"] / step["from_kl"]
        here, note = ' class="here"', '<span class="unseen"> (this checkpoint)</span>'
        if i != reached:
            here = note = ""
        lines.append(
            f"<tr{here}><th scope='row'>{step['to_bpw']:.2f}{note}</th>"
            f"<td>{digits(step['to_kl'])}</td>"
            f'<td class="fall"><b>{MINUS}{100 * fall:.1f} %</b>'
            f'<i style="--share:{fall / steepest:.3f}" aria-hidden="true"></i></td>'
            f"<td>{shares(step['bits'], used)}</td></tr>"
        )
    near = steps[reached]
    fall = 1 - near["to_kl"] / near["from_kl"]
    most = max(near["bits"], key=lambda kind: near["bits"][kind])
    said = (
        f"The last step to this size took {100 * fall:.1f} % off the predicted error; most went to {most}."
        " Each line is the best way to spend one more tenth of a bit."
    )
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="What each bit bought">'
        '<table class="bought"><caption class="unseen">What each further tenth of a bit buys</caption><thead>'
        '<tr><th scope="col">bits a weight</th><th scope="col">KL, nats</th>'
        '<th scope="col">error falls by</th>'
        f'<th scope="col">who gets them</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
    return section("bought", "What each bit bought", said, f"{legend(used)}{table}")


def provenance(report: Report) -> str:
    """Evaluations, command, settings, versions and notes."""
    parts = []
    if report["evaluations"]:
        cells = [
            [
                entry["text"],
                f"{entry['windows']} {TIMES} {entry['length']}",
                digits(entry["kl"]),
                f"{perplexity(entry['ppl'])} ({perplexity(entry['ppl_original'])})",
                percent(entry["top1"]),
                MISSING if entry["router_topk"] is None else percent(entry["router_topk"]),
            ]
            for entry in report["evaluations"]
        ]
        heads = ["text", "tokens", "KL, nats", "perplexity (original)", "same token", "same experts"]
        parts.append(f"<h3>Evaluations</h3>{data_table('Evaluations', heads, cells)}")
    if report["command"]:
        parts.append(
            "<h3>The command that makes it again</h3>"
            f'<pre class="command" tabindex="0"><code>{_words(report["command"])}</code></pre>'
        )
    calibration = report["calibration"]
    settings = report["settings"]
    facts = {name: value for name, value in settings.items() if value is not None}
    facts |= {
        f"calibration {name}": f"{value:,}" if isinstance(value, int) and name != "seed" else value
        for name, value in calibration.items()
        if value not in (None, settings.get("calibration" if name == "source" else name))
    }
    facts["written by"] = report["model"]["producer"]
    parts.append(f"<h3>Settings</h3>{_facts(facts)}")
    if report["versions"]:
        parts.append(f"<h3>Versions</h3>{_facts(report['versions'])}")
    if report["notes"]:
        items = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
        parts.append(
            f'<details><summary>Notes of the conversion</summary><ul class="notes">{items}</ul></details>'
        )
    return section("made", "How it was made", "", "".join(parts))


def _words(command: str) -> str:
    """A command line that breaks between its words, not after the dashes of an option."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _facts(facts: dict[str, Any]) -> str:
    items = (
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def section(name: str, title: str, said: str, content: str, wide: bool = False) -> str:
    """A section with its heading and a sentence or two beside it, or above where it is wide."""
    kind = ' class="wide"' if wide else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"{kind}><div class="side">'
        f'<h2 id="{name}-title">{escape(title)}</h2><p>{escape(said.strip())}</p></div>'
        f'<div class="content">{content}</div></section>'
    )


def data_table(caption: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A plain table; the first column heads its rows."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in cells
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="data">'
        f'<caption class="unseen">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(table: str) -> str:
    """A table that waits behind a picture."""
    return f"<details><summary>The same as a table</summary>{table}</details>"
