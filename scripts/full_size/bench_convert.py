"""Where the time of measuring and quantizing a block goes, beside what each step has to compute.

    python -m dbrx_quant.scripts.full_size.bench_convert DIR [--experts-measured N] [--rows R --length L]
        [--bpw BPW] [--effort NAME] [--work-dir DIR] [--json] [--record DIR]

Runs both passes of `convert` on the first block of a source such as `make_synthetic` writes, attention and
a few experts, whose times then count for all: those whose number of tokens is nearest to the average.
Trials that experts of a role share count once. The floor of a step is what it has to compute at the speed
of the fastest large float32 product that was seen here before and after, and what it has to move at the
speed of a copy. The head is left out, and so is the reading of all weights that looks for NaN.

Beside the seconds on the clock are those of the processor, a thread's share of them, which other programs on
the machine hardly change. The command sets GOMP_SPINCOUNT=1000; do so here, or waiting threads count as well.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.routing import coverage
from dbrx_quant.calibration.blocks.states import States, new_states, open_states
from dbrx_quant.calibration.blocks.walk import Turn, embed_rows, route
from dbrx_quant.calibration.text.tokens import load_tokens, split_held_out
from dbrx_quant.quantize import first_pass, second_pass
from dbrx_quant.quantize.conversion import peak_memory
from dbrx_quant.quantize.entries import Entry
from dbrx_quant.quantize.first_pass import MeasureJob
from dbrx_quant.quantize.measurement import LinearMeasurement, Measurement
from dbrx_quant.quantize.second_pass import QuantizeJob
from dbrx_quant.quantize.solve.ldlq import EFFORTS
from dbrx_quant.runtime.families.facts import ExpertsSpec
from dbrx_quant.runtime.kernels.float_matmul import fast_products
from dbrx_quant.runtime.output.progress import bar
from dbrx_quant.scripts.dev.bench_record import add_record_argument, record
from dbrx_quant.scripts.full_size.convert_steps import STEPS
from dbrx_quant.scripts.full_size.repeated_source import repeated_sources
from dbrx_quant.scripts.full_size.step_clock import REST, Clock, Total, replaced, timed
from dbrx_quant.scripts.terminal.arguments import positive
from dbrx_quant.scripts.terminal.output import (
    bytes_text,
    print_json,
    print_table,
    quiet_on_closed_pipe,
    seconds_text,
)

PRODUCT = (2048, 6144, 6144)  # of the matrices whose product shows the machine's speed
COPIED = 1 << 28  # values


@dataclass(frozen=True)
class Speed:
    """What the machine reached: operations and bytes per second."""

    operations: float
    moved: float

    def floor(self, total: Total) -> float:
        """Seconds that a step takes at least; 0 where nothing is counted of it."""
        return total.operations / self.operations + total.moved / self.moved


def speed(seconds: float) -> Speed:
    """The fastest product and copy that were seen in so many seconds each."""
    rows, k, n = PRODUCT
    a, b, source = torch.randn(rows, k), torch.randn(k, n), torch.ones(COPIED)
    product, target = torch.empty(rows, n), torch.empty(COPIED)

    def fastest(run: Callable[[], Any]) -> float:
        """A thread's share of the processor time, which other programs on the machine hardly change."""
        run()  # touches the memory for the first time
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            started = time.process_time()
            run()
            best = min(best, time.process_time() - started)
        return best / torch.get_num_threads()

    return Speed(
        2 * rows * k * n / fastest(lambda: torch.mm(a, b, out=product)),
        2 * source.nbytes / fastest(lambda: target.copy_(source)),
    )


def average_experts(model: StreamedModel, states: States, count: int) -> list[int]:
    """The experts of the first block with the most usual numbers of tokens."""
    experts = model.architecture.blocks[0].experts
    if experts is None:
        raise ValueError(f"{model.folder}: its first block has no experts")
    x = torch.empty(states.shape[0] * states.shape[1], states.shape[2])
    seen = coverage(route(model.block(0), states, None, x), experts.count)
    mean = sum(one.tokens for one in seen) / experts.count
    return sorted(sorted(range(experts.count), key=lambda e: abs(seen[e].tokens - mean))[:count])


@contextmanager
def some_experts(model: StreamedModel, chosen: Sequence[int], clock: Clock) -> Iterator[None]:
    """Inside the `with` block only these experts of the first block have turns, and stand for all."""
    whole = model.architecture
    block = whole.blocks[0]
    every = block.experts
    assert every is not None
    fewer = replace(every, linears=tuple(every.linears[e] for e in chosen))
    scale = every.count / len(chosen)

    def change(turns: Any) -> Any:
        def some(routing: Routing, experts: ExpertsSpec) -> Iterator[Turn]:
            for turn in turns(routing, every):
                if turn.expert in chosen:
                    clock.stand_for(scale)
                    try:
                        yield turn
                    finally:
                        clock.stand_for(1.0)

        return some

    model.architecture = replace(whole, blocks=(replace(block, experts=fewer), *whole.blocks[1:]))
    try:
        with replaced("dbrx_quant.calibration.blocks.walk:turns", change):
            yield
    finally:
        model.architecture = whole


def run(arguments: argparse.Namespace, model: StreamedModel, folder: Path, clock: Clock) -> dict[str, Any]:
    """Both passes over the first block, timed; facts of what was run."""
    tokens = load_tokens(arguments.calibration, model.folder, arguments.rows, arguments.length).input_ids
    calibration, held_out = split_held_out(tokens)
    shown = held_out if len(held_out) else None
    with bar(1, "bench", True) as progress, torch.no_grad():
        job = MeasureJob(
            model, calibration, folder / "measure", progress, effort=arguments.effort, held_out=shown
        )
        embed_rows(model, job.rows, job.states(0))
        chosen = average_experts(model, open_states(job.states(0)), arguments.experts_measured)
        shape = (job.backward_rows, calibration.shape[1], model.architecture.hidden)
        with new_states(job.gradients(1), shape) as gradients:  # of a loss that nobody computes here
            torch.randn(shape, generator=torch.Generator().manual_seed(0), out=gradients).mul_(1e-3)
        job.entry("").parent.mkdir()
        with some_experts(model, chosen, clock), timed(clock, STEPS):
            with clock.phase("measuring"):
                first_pass._forward_block(job, 0)
                first_pass._backward(job, 0)
            measured = {
                spec.name: Entry.read(job.entry(spec.name)).linear
                for spec in model.architecture.blocks[0].linears()
            }
            groups = {name: nearest(linear, arguments.bpw) for name, linear in measured.items()}
            quantizing = QuantizeJob(
                model,
                calibration,
                folder / "quantize",
                Measurement(measured),
                groups,
                progress,
                arguments.effort,
                held_out=shown,
            )
            embed_rows(model, quantizing.all_tokens, quantizing.states(0))
            embed_rows(model, quantizing.all_tokens, quantizing.original(0))
            with clock.phase("quantizing"):
                second_pass._quantize_block(quantizing, 0)
    return {"experts_measured": chosen, "tokens": tokens.numel(), "calibration_tokens": calibration.numel()}


def nearest(linear: LinearMeasurement, bpw: float) -> str:
    """The group map whose bits per weight are nearest to a target."""
    return min(linear.options, key=lambda option: abs(option.bits / linear.weights - bpw)).groups


def figures(clock: Clock, machine: Speed) -> dict[str, Any]:
    """The table of each phase, the longest step first and the rest last; processor time is a thread's."""
    report, threads = {}, torch.get_num_threads()
    for phase, totals in clock.phases.items():
        whole = sum(total.seconds for total in totals.values())
        processor = sum(total.processor for total in totals.values())
        order = sorted(totals, key=lambda name: (name == REST, -totals[name].seconds))
        report[phase] = {
            "seconds": whole,
            "processor_seconds": processor / threads,
            "spent_seconds": clock.spent[phase],
            "steps": [
                {
                    "step": name,
                    "calls": round(totals[name].calls),
                    "seconds": totals[name].seconds,
                    "share": totals[name].seconds / whole,
                    "processor_seconds": totals[name].processor / threads,
                    "processor_share": totals[name].processor / processor,
                    "floor_seconds": machine.floor(totals[name]),
                }
                for name in order
            ],
        }
    return report


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    for phase, found in report["phases"].items():
        print_table(
            f"{phase}: {seconds_text(found['seconds'])} a block, by the processor's time "
            f"{seconds_text(found['processor_seconds'])}; {seconds_text(found['spent_seconds'])} here",
            ["step", "calls", "seconds", "share", "reached", "processor", "share", "reached", "floor"],
            [_row(step) for step in found["steps"]],
        )
    block, processor = (
        sum(found[key] for found in report["phases"].values()) for key in ("seconds", "processor_seconds")
    )
    print(
        f"{report['tokens']} tokens, {report['threads']} threads, experts {report['experts_measured']} of "
        f"{report['experts']}; {report['product_gflops']:.0f} GFLOPS, {report['copy_gb_per_s']:.1f} GB/s; "
        f"peak memory {bytes_text(report['peak_bytes'])}; {report['blocks']} such blocks: "
        f"{seconds_text(report['blocks'] * block)}, by the processor's time "
        f"{seconds_text(report['blocks'] * processor)}"
    )


def _row(step: dict[str, Any]) -> list[str]:
    floor, cells = step["floor_seconds"], [step["step"], f"{step['calls']}"]
    for seconds, share in (
        (step["seconds"], step["share"]),
        (step["processor_seconds"], step["processor_share"]),
    ):
        reached = f"{100 * floor / seconds:.0f} %" if floor and seconds else ""
        cells += [f"{seconds:.2f}", f"{100 * share:.1f} %", reached]
    return [*cells, f"{floor:.2f}" if floor else ""]


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="a source, of which all blocks need not be stored"
    )
    parser.add_argument(
        "--experts-measured", type=positive, default=2, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--rows", type=positive, default=32, help="of tokens (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=256, help="of a row (default: %(default)s)")
    parser.add_argument(
        "--calibration", default="offline", metavar="NAME|FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--bpw", type=float, default=3.0, help="of the quantized linears (default: %(default)s)"
    )
    parser.add_argument("--effort", choices=EFFORTS, default="default", help="(default: %(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="for some GB of files (default: the system's)"
    )
    parser.add_argument(
        "--trial", type=float, default=4.0, help="seconds of a trial of speed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    clock = Clock()
    with repeated_sources(), fast_products(), tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        model = StreamedModel(arguments.folder)
        before = speed(arguments.trial)
        facts = run(arguments, model, Path(name), clock)
        peak = peak_memory()
        after = speed(arguments.trial)
    machine = Speed(max(before.operations, after.operations), max(before.moved, after.moved))
    experts = model.architecture.blocks[0].experts
    assert experts is not None
    report = {
        **facts,
        "threads": torch.get_num_threads(),
        "experts": experts.count,
        "blocks": len(model.architecture.blocks),
        "product_gflops": machine.operations / 1e9,
        "copy_gb_per_s": machine.moved / 1e9,
        "peak_bytes": peak,
        "phases": figures(clock, machine),
    }
    record("convert", arguments, report)
    if arguments.json:
        print_json(report)
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
