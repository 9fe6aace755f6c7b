"""`dbrx-quant convert`: a model folder in, one EXL2 checkpoint for each target out."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_quant.scripts.terminal.arguments import (
    add_model_argument,
    add_options,
    bpw_list,
    find_model,
    options_of,
    positive,
    size,
)
from dbrx_quant.scripts.terminal.coverage import print_coverage
from dbrx_quant.scripts.terminal.output import bytes_text, print_json, print_table, say, seconds_text
from dbrx_quant.scripts.terminal.verb import Verb

if TYPE_CHECKING:
    from dbrx_quant.quantize.conversion import Converted
    from dbrx_quant.quantize.estimate.plan import Plan
    from dbrx_quant.quantize.options import ConvertOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser, "the original's folder, or its id on the Hub", "model", "MODEL")
    parser.add_argument("out", metavar="OUT", type=Path, help="the result; OUT/<bpw>bpw for several targets")
    goal = parser.add_argument_group("target").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--bpw",
        type=bpw_list,
        metavar="BPW[,BPW...]",
        help="bits per weight of the decoder's linears, overhead included; several share one measurement",
    )
    goal.add_argument("--size", type=size, help="as many bits as fit in a checkpoint of, say, 40GB")
    goal.add_argument(
        "--vram", type=size, metavar="SIZE", help="as many bits as run in, say, 48GB; see --context"
    )
    parser.add_argument(
        "--context", type=positive, default=8192, help="tokens of cache for --vram (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print size, memory and time, and stop")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, or say what converting would take."""
    from dbrx_quant.quantize.conversion import convert
    from dbrx_quant.quantize.estimate.plan import plan
    from dbrx_quant.quantize.estimate.sizes import bpw_for_size, bpw_for_vram
    from dbrx_quant.quantize.measurement import MEASUREMENT_NAME
    from dbrx_quant.quantize.workers.ranks import rank

    options = options_of(
        arguments, find_model(arguments.model, arguments), arguments.out, targets=arguments.bpw or ()
    )
    if rank():
        if not arguments.dry_run:
            convert(options)
        return 0
    if arguments.size is not None:
        options = _aim(options, bpw_for_size(options, arguments.size))
    if arguments.vram is not None:
        options = _aim(options, bpw_for_vram(options, arguments.vram, arguments.context))
    if arguments.dry_run:
        planned = plan(options)
        print_json(planned.to_json()) if arguments.json else _print_plan(planned)
        return 0
    results = convert(options)
    if arguments.json:
        print_json({"results": [{**asdict(result), "folder": str(result.folder)} for result in results]})
    else:
        print_coverage(results[0].folder / MEASUREMENT_NAME)
        _print_results(results)
    return 0


def _aim(options: "ConvertOptions", bpw: float) -> "ConvertOptions":
    if not options.quiet:
        say(f"target: {bpw} bits per weight")
    return replace(options, targets=(bpw,))


def _print_results(results: "list[Converted]") -> None:
    print_table(
        "converted",
        ["folder", "target", "bpw", "predicted KL", "measured KL", "size", "time"],
        [
            [
                str(result.folder),
                f"{result.target_bpw:g}",
                f"{result.bpw:.4f}",
                f"{result.predicted_kl:.5f}",
                "-" if result.measured_kl is None else f"{result.measured_kl:.5f}",
                bytes_text(result.total_bytes),
                seconds_text(result.seconds),
            ]
            for result in results
        ],
        note="KL: on held-out rows, not used for calibration; peak memory: "
        + bytes_text(max(result.peak_bytes for result in results)),
    )


def _print_plan(planned: "Plan") -> None:
    print_table(
        f"{planned.family}: {planned.weights:,} weights in the decoder's linears",
        ["target", "size", "within reach"],
        [
            [f"{target.bpw:g}", bytes_text(target.total_bytes), "yes" if target.reachable else "no"]
            for target in planned.targets
        ],
    )
    print_table(
        "rough estimate",
        ["", ""],
        [
            ["bits per weight within reach", f"{planned.lowest_bpw:.3f} to {planned.highest_bpw:.3f}"],
            ["peak memory", bytes_text(planned.peak_bytes)],
            *([] if planned.device_bytes is None else [["of the device", bytes_text(planned.device_bytes)]]),
            ["work folder", bytes_text(planned.disk_bytes)],
            ["measuring, once", _time_text(planned.measure_seconds)],
            ["quantizing, each target", _time_text(planned.quantize_seconds)],
        ],
        note="Times assume an otherwise idle machine and may be off by a factor of two.",
    )


def _time_text(seconds: float | None) -> str:
    return "not known on this device" if seconds is None else seconds_text(seconds)


VERB = Verb(
    "convert",
    "quantize a model to EXL2 at the requested bits per weight",
    "dbrx-quant convert models/dbrx-instruct out/dbrx --bpw 2.25,3.0,4.25",
    add_arguments,
    run,
    resumable=True,
)
