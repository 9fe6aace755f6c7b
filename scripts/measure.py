"""`dbrx-quant measure`: what each choice of bits costs in each linear, as a file for later conversions."""

import argparse
from pathlib import Path

from dbrx_quant.scripts.coverage import print_coverage
from dbrx_quant.scripts.output import print_json
from dbrx_quant.scripts.verb import Verb, add_measuring_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="the original's folder, or its id on the Hub")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="measurement.json")
    add_measuring_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the file."""
    from dbrx_quant.quantize.conversion import measure_model
    from dbrx_quant.quantize.options import ConvertOptions
    from dbrx_quant.runtime.loader import find_folder

    options = ConvertOptions(
        model=find_folder(arguments.model, None),
        out=arguments.output,
        calibration=arguments.calibration,
        rows=arguments.rows,
        length=arguments.length,
        seed=arguments.seed,
        effort=arguments.effort,
        held_out=arguments.held_out,
        held_out_rows=arguments.held_out_rows,
        work_dir=arguments.work_dir,
        resume=arguments.resume,
        max_memory=arguments.max_memory,
        device=arguments.device,
        quiet=arguments.quiet,
    )
    written = measure_model(options, arguments.output)
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
