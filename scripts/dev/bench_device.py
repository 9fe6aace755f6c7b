"""What the steps of converting one expert take on a device, such as a GPU, beside the CPU.

    python -m dbrx_quant.scripts.dev.bench_device --device cuda [--hidden D --ffn F --tokens T] [--json]

One of DBRX's experts with random weights and its share of 65,536 tokens goes through what `convert` does with
it, step by step, each waited for. `bench_gpu` ends with the same figures. On a CPU alone there is one column.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.model import Routing
from dbrx_quant.calibration.blocks.walk import Turn, Weights, activation
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize.solve.linear import solve_linear
from dbrx_quant.quantize.solve.prepare import Prepared, prepare
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, repaired
from dbrx_quant.runtime.exl2.format import uniform_groups
from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.kernels.device import CPU, device_name, find_device, upload
from dbrx_quant.runtime.kernels.float_matmul import exact_on_gpus, fast_products, narrowed, product
from dbrx_quant.scripts.terminal.arguments import positive
from dbrx_quant.scripts.terminal.output import (
    bytes_text,
    print_json,
    print_table,
    quiet_on_closed_pipe,
    seconds_text,
)

HIDDEN, FFN, TOKENS = 6144, 10752, 16384  # tokens: a quarter of 65,536
ROW = 512  # tokens of a row


@dataclass(frozen=True)
class Expert:
    """An expert before a conversion: weights [N, K] bfloat16 and inputs [T, D] float32, on the host."""

    weights: Weights
    x: Tensor

    @staticmethod
    def drawn(hidden: int, ffn: int, tokens: int) -> "Expert":
        """One of random numbers."""
        generator = torch.Generator().manual_seed(0)

        def matrix(n: int, k: int) -> Tensor:
            return torch.randn(n, k, generator=generator).div_(k**0.5).bfloat16()

        weights = matrix(ffn, hidden), matrix(ffn, hidden), matrix(hidden, ffn)
        return Expert(weights, torch.randn(tokens, hidden, generator=generator))

    def turn(self, device: torch.device) -> Turn:
        """Its turn, with all tokens routed to it."""
        count, (ffn, hidden) = len(self.x), self.weights[0].shape
        routing = Routing(
            self.x, torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1), 0.5), device
        )
        gate, up = (LinearSpec(role, role, "", None, (hidden, ffn), ()) for role in ("gate", "up"))
        down = LinearSpec("down", "down", "", None, (ffn, hidden), ())
        return Turn(0, gate, up, down, routing, activation("silu"))


@exact_on_gpus()
@fast_products()
@torch.no_grad()
def steps(expert: Expert, device: torch.device) -> dict[str, float]:
    """Seconds of each step on a device, in the order of a conversion."""
    clock = _Clock(device)
    turn, rows = expert.turn(device), torch.arange(len(expert.x)) // ROW
    dense = clock("weights to the device", lambda: tuple(w.to(device).float() for w in expert.weights))
    gate, up, down = (narrowed(weight) for weight in dense)
    stream = torch.zeros_like(expert.x)
    clock("forward, shares added on the host", lambda: turn.add_to(stream, (gate, up, down)))
    clock("backward", partial(_backward, turn, (gate, up, down), stream))
    residual = clock("moments of the inner states", partial(_moments, turn, (gate, up, down), stream, rows))
    weight = clock("repair of the down projection", lambda: repaired(dense[2], residual, DEFAULT_REPAIR))
    prepared: Prepared = clock(
        "Hessian and factor of the down projection",
        lambda: prepare(hessian(residual.inputs.joined(), None, Shrinkage(0.1))),
    )
    groups = uniform_groups(weight.shape[1], 3, 128)
    clock("down projection solved (codes on the CPU)", lambda: solve_linear(weight, prepared, groups))
    return clock.seconds


class _Clock:
    """Times calls on a device, each until it has finished there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, dict[str, float]()

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        self._wait()
        started = time.perf_counter()
        result = call()
        self._wait()
        self.seconds[name] = time.perf_counter() - started
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _backward(turn: Turn, weights: Weights, upstream: Tensor) -> None:
    gate, up, down = weights
    for span in turn.spans():
        x = span.x.requires_grad_()
        with torch.enable_grad():
            h = turn.inner(x, gate, up)
        above = span.weight[:, None] * upload(upstream[span.index], x.device)
        torch.autograd.grad(h, x, product(above, down.T))


def _moments(turn: Turn, weights: Weights, stream: Tensor, rows: Tensor) -> ResidualMoments:
    inputs = SplitMoments.zero(turn.down.shape[0], device=turn.routing.device)
    residual = ResidualMoments(inputs, *turn.down.shape)
    for span in turn.spans():
        h, token_rows = turn.inner(span.x, *weights[:2]), rows[span.index]
        inputs.add(h, token_rows, span.weight.square())
        residual.add(h, upload(stream[span.index], h.device), token_rows, span.weight)
    return residual


def figures(device: torch.device, hidden: int, ffn: int, tokens: int) -> dict[str, Any]:
    """Seconds of each step on the CPU and on the device, JSON-ready, and the device's peak memory."""
    expert, memory = Expert.drawn(hidden, ffn, tokens), None
    found = {"cpu": steps(expert, CPU)}
    if device != CPU:
        steps(expert, device)  # libraries choose their kernels at first use
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found[device.type] = steps(expert, device)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
    shape = {"hidden": hidden, "ffn": ffn, "tokens": tokens}
    return {"device": device_name(device), "shape": shape, "seconds": found, "peak_device_bytes": memory}


def print_figures(found: dict[str, Any]) -> None:
    """A table: a step a line, a device a column."""
    seconds: dict[str, dict[str, float]] = found["seconds"]
    peak = found["peak_device_bytes"]
    print_table(
        f"one expert on {found['device']}",
        ["step", *seconds],
        [[step, *(seconds_text(column[step]) for column in seconds.values())] for step in seconds["cpu"]],
        note="" if peak is None else f"peak memory of the device: {bytes_text(peak)}",
    )


@quiet_on_closed_pipe
def main(arguments: list[str] | None = None) -> int:
    """Time the steps and print them."""
    parser = argparse.ArgumentParser(description="Time the steps of converting one expert on a device.")
    parser.add_argument("--device", default="cpu", help="beside the CPU (default: the CPU alone)")
    parser.add_argument("--hidden", type=positive, default=HIDDEN)
    parser.add_argument("--ffn", type=positive, default=FFN)
    parser.add_argument("--tokens", type=positive, default=TOKENS)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = figures(device, options.hidden, options.ffn, options.tokens)
    print_json(found) if options.json else print_figures(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
