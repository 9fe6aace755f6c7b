"""`dbrx-quant inspect`: what a quantized folder spends its bits on.

Not named after its verb: a script run from this folder would find it in place of the standard library's
`inspect`.
"""

import argparse
from typing import TYPE_CHECKING

from dbrx_quant.scripts.terminal.arguments import add_model_argument, find_model
from dbrx_quant.scripts.terminal.output import bytes_text, print_json, print_table
from dbrx_quant.scripts.terminal.verb import Verb

if TYPE_CHECKING:
    from dbrx_quant.runtime.folder.inspect import FolderFacts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    from dbrx_quant.runtime.folder.inspect import inspect_folder

    facts = inspect_folder(find_model(arguments.folder, arguments))
    if arguments.json:
        print_json(facts.to_json())
        return 0
    _print_blocks(facts, arguments.folder)
    _print_experts(facts)
    _print_widths(facts)
    return 0


def _print_blocks(facts: "FolderFacts", title: str) -> None:
    cells = facts.block_roles
    print_table(
        f"{title}: {facts.family}, {facts.bpw:.4f} bits per weight, head {facts.head_bpw:.4f}, "
        f"{bytes_text(facts.total_bytes)}",
        ["block", "all", *facts.roles],
        [
            [str(block), f"{bpw:.3f}"]
            + [f"{cells[block, role]:.3f}" if (block, role) in cells else "" for role in facts.roles]
            for block, bpw in facts.blocks.items()
        ],
    )


def _print_experts(facts: "FolderFacts") -> None:
    """For each block the experts with the fewest and the most bits."""
    rows = []
    for block in facts.blocks:
        experts = {expert: bpw for (at, expert), bpw in facts.experts.items() if at == block}
        if experts:
            low = min(experts, key=lambda expert: experts[expert])
            high = max(experts, key=lambda expert: experts[expert])
            middle = sorted(experts.values())[len(experts) // 2]
            ends = [f"{experts[at]:.3f} (expert {at})" for at in (low, high)]
            spread = experts[high] - experts[low]
            rows.append([str(block), ends[0], f"{middle:.3f}", ends[1], f"{spread:.3f}"])
    if rows:
        print_table("bits per weight of experts", ["block", "fewest", "median", "most", "spread"], rows)


def _print_widths(facts: "FolderFacts") -> None:
    widths = sorted({bits for shares in facts.role_widths.values() for bits in shares}, reverse=True)
    print_table(
        "share of the weights stored at each width",
        ["", *(f"{bits} bits" for bits in widths)],
        [
            [role, *(f"{100 * shares[bits]:.1f} %" if bits in shares else "" for bits in widths)]
            for role, shares in facts.role_widths.items()
        ],
    )


VERB = Verb(
    "inspect",
    "show the bits of every block, role, expert and matrix of a quantized folder",
    "dbrx-quant inspect out/dbrx --json",
    add_arguments,
    run,
)
