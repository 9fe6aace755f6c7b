"""`dbrx-quant convert`: a model folder in, one EXL2 checkpoint for each target out."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_quant.scripts.coverage import print_coverage
from dbrx_quant.scripts.output import bytes_text, print_json, print_table, say, seconds_text
from dbrx_quant.scripts.verb import Verb, add_measuring_arguments, bpw_list, positive, size

if TYPE_CHECKING:
    from dbrx_quant.quantize.conversion import Converted
    from dbrx_quant.quantize.options import ConvertOptions
    from dbrx_quant.quantize.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="the original's folder, or its id on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="the result; OUT/<bpw>bpw for several targets")
    goal = parser.add_argument_group("target").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--bpw",
        type=bpw_list,
        metavar="BPW[,BPW...]",
        help="bits per weight of the decoder's linears, overhead included; several share one measurement",
    )
    goal.add_argument("--size", type=size, help="as many bits as fit in a checkpoint of, say, 40GB")
    goal.add_argument("--vram", type=size, metavar="SIZE", help="as many as run in, say, 48GB; see --context")
    parser.add_argument(
        "--context", type=positive, default=8192, help="tokens of cache for --vram (default: %(default)s)"
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        default=6,
        help="width of the head (default: %(default)s)",
    )
    parser.add_argument("--measurement", type=Path, metavar="FILE", help="of this model, to use again")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default=8_000_000_000,
        metavar="SIZE",
        help="of a file (default: 8GB); a result that is finished already keeps its files",
    )
    parser.add_argument(
        "--refit", action="store_true", help="fit the scales of groups once more when their codes are fixed"
    )
    parser.add_argument("--dry-run", action="store_true", help="print size, memory and time, and stop")
    add_measuring_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, or tell what converting would take."""
    from dbrx_quant.quantize.conversion import convert
    from dbrx_quant.quantize.options import ConvertOptions
    from dbrx_quant.quantize.plan import bpw_for_size, bpw_for_vram, plan
    from dbrx_quant.runtime.loader import find_folder

    options = ConvertOptions(
        model=find_folder(arguments.model, None),
        out=arguments.out,
        targets=arguments.bpw or (),
        head_bits=arguments.head_bits,
        calibration=arguments.calibration,
        rows=arguments.rows,
        length=arguments.length,
        seed=arguments.seed,
        effort=arguments.effort,
        held_out=arguments.held_out,
        held_out_rows=arguments.held_out_rows,
        refit=arguments.refit,
        measurement=arguments.measurement,
        work_dir=arguments.work_dir,
        resume=arguments.resume,
        max_memory=arguments.max_memory,
        device=arguments.device,
        max_shard_bytes=arguments.max_shard_size,
        quiet=arguments.quiet,
    )
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
        print_coverage(results[0].folder / "measurement.json")
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
        note="KL: on held-out rows, which were not calibrated on; most memory: "
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
        "what it takes, roughly",
        ["", ""],
        [
            ["bits per weight within reach", f"{planned.lowest_bpw:.3f} to {planned.highest_bpw:.3f}"],
            ["memory at a time", bytes_text(planned.peak_bytes)],
            ["work folder", bytes_text(planned.disk_bytes)],
            ["measuring, once", seconds_text(planned.measure_seconds)],
            ["quantizing, each target", seconds_text(planned.quantize_seconds)],
        ],
        note="Times are for a machine with nothing else to do, and may be off by a factor of two.",
    )


VERB = Verb(
    "convert",
    "quantize a model to EXL2 at the bits per weight asked for",
    "dbrx-quant convert models/dbrx-instruct out/dbrx --bpw 2.25,3.0,4.25",
    add_arguments,
    run,
    resumable=True,
)
