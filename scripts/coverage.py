"""The coverage table: how many calibration tokens the experts of each block saw."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.output import print_table


def print_coverage(measurement: Path) -> None:
    """Print the table of a measurement.json; nothing for a model without experts."""
    coverage: Mapping[str, list[Mapping[str, float]]] = _read(measurement)["coverage"]
    rows = []
    for block in sorted(coverage, key=int):
        tokens = [int(expert["tokens"]) for expert in coverage[block]]
        low, high = tokens.index(min(tokens)), tokens.index(max(tokens))
        ends = [f"{tokens[at]} (expert {at})" for at in (low, high)]
        rows.append([block, ends[0], str(sorted(tokens)[len(tokens) // 2]), ends[1], str(tokens.count(0))])
    if rows:
        print_table(
            "calibration tokens of experts", ["block", "fewest", "median", "most", "without any"], rows
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
