"""The coverage table: how many calibration tokens the experts of each block saw."""

from pathlib import Path

from dbrx_quant.scripts.terminal.output import print_table


def print_coverage(file: Path) -> None:
    """Print the table of a measurement.json; nothing for a model without experts."""
    from dbrx_quant.quantize.measurement import read_measurement

    rows = []
    for block, experts in read_measurement(file).coverage.items():
        tokens = [expert.tokens for expert in experts]
        low, high = tokens.index(min(tokens)), tokens.index(max(tokens))
        ends = [f"{tokens[at]} (expert {at})" for at in (low, high)]
        middle = sorted(tokens)[len(tokens) // 2]
        rows.append([str(block), ends[0], str(middle), ends[1], str(tokens.count(0))])
    if rows:
        print_table(
            "calibration tokens of experts", ["block", "fewest", "median", "most", "without any"], rows
        )
