"""`dbrx-quant measure`: what each choice of bits costs in each linear, as a file for later conversions."""

import argparse
from pathlib import Path

from dbrx_quant.scripts.terminal.arguments import add_model_argument, add_options, find_model, options_of
from dbrx_quant.scripts.terminal.coverage import print_coverage
from dbrx_quant.scripts.terminal.output import print_json
from dbrx_quant.scripts.terminal.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser, "the original's folder, or its id on the Hub", "model", "MODEL")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="measurement.json")
    add_options(parser, measuring=True)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the file."""
    from dbrx_quant.quantize.conversion import measure_model
    from dbrx_quant.quantize.workers.ranks import rank

    options = options_of(arguments, find_model(arguments.model, arguments), arguments.output)
    written = measure_model(options, arguments.output)
    if rank():
        return 0
    if arguments.json:
        print_json({"measurement": str(written)})
    else:
        print_coverage(written)
        print(written)
    return 0


VERB = Verb(
    "measure",
    "measure what each choice of bits costs, for 'convert --measurement'",
    "dbrx-quant measure models/dbrx-instruct -o measurement.json",
    add_arguments,
    run,
    resumable=True,
)
