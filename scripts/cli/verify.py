"""`dbrx-quant verify`: check a quantized folder against every rule; a line for each violation."""

import argparse

from dbrx_quant.runtime.output.progress import counter
from dbrx_quant.scripts.terminal.arguments import add_model_argument, add_quiet_argument, find_model
from dbrx_quant.scripts.terminal.output import bytes_text, print_json, say
from dbrx_quant.scripts.terminal.verb import Verb

CHECK_FAILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument(
        "--no-checksums", action="store_true", help="don't read whole shards to compare their checksums"
    )
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify; 3 where something is wrong."""
    from dbrx_quant.runtime.folder.verify import verify

    folder = find_model(arguments.folder, arguments)
    with counter("checksums", "B", arguments.quiet or arguments.no_checksums) as progress:
        report = verify(folder, checksums=not arguments.no_checksums, progress=progress)
    if arguments.json:
        print_json(
            {"ok": report.ok, "faults": report.faults, "warnings": report.warnings, "facts": report.facts}
        )
    else:
        for warning in report.warnings:
            say(f"warning: {warning}")
        for fault in report.faults:
            print(fault)
        if report.ok:
            facts = report.facts
            print(
                f"{arguments.folder}: sound: {facts['linears']} quantized linears in {facts['shards']} "
                f"shards, {facts['bpw']:.4f} bits per weight, {bytes_text(facts['total_bytes'])}"
            )
    return 0 if report.ok else CHECK_FAILED


VERB = Verb(
    "verify",
    "check every rule of the format, the checksums, the tokenizer and the config, and try it out",
    "dbrx-quant verify out/dbrx",
    add_arguments,
    run,
)
