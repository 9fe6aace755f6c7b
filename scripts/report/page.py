"""The report as one HTML file that needs nothing else: style, script, pictures and data are all inside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.report import comparison, sections
from dbrx_quant.scripts.report.data import Report, label
from dbrx_quant.scripts.report.marks import escape

_HERE = Path(__file__).parent


def render(data: Report) -> str:
    """The page of one report, or of several where `data` comes from `compare`."""
    reports = data.get("reports")
    if reports is None:
        head = sections.masthead(data)
        parts = {
            "bits": sections.heat_maps(data),
            "coverage": sections.coverage(data),
            "curve": sections.curve(data),
            "blocks": sections.block_errors(data),
            "bought": sections.bits_bought(data),
            "made": sections.provenance(data),
        }
        body, title = sections.tiles(data), label(data)
    else:
        head = comparison.masthead(reports)
        parts = {
            "numbers": comparison.side_by_side(reports),
            "curve": comparison.curve(reports),
            "differences": comparison.differences(data),
        }
        body, title = "", comparison.heading(reports)
    return _frame(title, head, body, {name: part for name, part in parts.items() if part}, data)


_NAMES = {
    "bits": "Bits and errors",
    "coverage": "Coverage",
    "curve": "Error and size",
    "blocks": "Blocks",
    "bought": "Each bit",
    "made": "How it was made",
    "numbers": "Numbers",
    "differences": "Differences",
}


def _frame(title: str, head: str, body: str, parts: Mapping[str, str], data: Mapping[str, Any]) -> str:
    links = "".join(f'<li><a href="#{name}">{_NAMES[name]}</a></li>' for name in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}: quantization report</title>
<link rel="icon" href="data:,">
<style>
{_own("style.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<div class="bar"><p class="kicker">Quantization report</p>
<button type="button" id="theme" hidden>Theme</button></div>
{head}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">
{body}
{"".join(parts.values())}
</main>
<footer><p>Written by <b>dbrx-quant</b>. Nats are natural units of information: a KL divergence of 0.01 nats
means that the quantized model spends a hundredth of a nat more on each token than the original
would.</p></footer>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{json_text(data)}</script>
<script>
{_own("script.js")}</script>
</body>
</html>
"""


def json_text(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element, whatever names are in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, code)
    return text


def _own(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
