"""How long measuring and quantizing take: operations counted from what the code does, and their speed here.

Counted are products of matrices, and the solver's own loops as what products would do in their time. Left out
are attention scores, activations, reading and writing.
"""

import math
import time
from collections.abc import Sequence

import torch

from dbrx_quant.calibration.blocks.routing import PRIOR_TOKENS
from dbrx_quant.quantize.budget.curve import FEEDBACK_WIDTHS
from dbrx_quant.quantize.budget.groups import GROUP_ROWS
from dbrx_quant.quantize.first_pass import backward_stride
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.prepare import SAMPLE_COLUMNS
from dbrx_quant.quantize.solve.shrinkage import DAMPINGS, PRIORS
from dbrx_quant.runtime.exl2.format import WIDTHS
from dbrx_quant.runtime.families.facts import Architecture, BlockSpec, LinearSpec
from dbrx_quant.runtime.kernels.float_matmul import fast_products

LOADED = 0.6  # of the speed of one big product, what a whole pass reaches
SEARCHED = 600  # what the error table takes for a weight at one width
SOLVED: dict[Effort, int] = {"fast": 3000, "default": 12000, "best": 40000}  # what solving a weight takes


def machine_speed() -> float:
    """Operations per second of a conversion on this machine with torch's threads, if it is otherwise idle.

    A trial of 0.3 seconds: one thread multiplies, in pieces of a millisecond, and the fastest counts. So it
    does not matter what else runs; with all threads a busy machine's figures differed by a factor of ten.
    """
    size, threads, fastest = 512, torch.get_num_threads(), math.inf
    a, b = torch.randn(size, size), torch.randn(size, size)
    with fast_products():
        torch.set_num_threads(1)
        try:
            _ = a @ b
            end = time.perf_counter() + 0.3
            while (started := time.perf_counter()) < end:
                _ = a @ b
                fastest = min(fastest, time.perf_counter() - started)
        finally:
            torch.set_num_threads(threads)
    return LOADED * threads * 2 * size**3 / fastest


def measuring_operations(architecture: Architecture, tokens: int, effort: Effort) -> float:
    """Operations of measuring on a number of tokens."""
    backward = 1 / backward_stride(tokens)
    total = 0.0
    for block in architecture.blocks:
        passes = 2 + backward + (block.experts is not None)  # with experts, once more to know the routing
        for stage in block.stages:
            total += _forward(stage, passes * tokens) + _curves(stage, tokens, 0, True, effort)
        for expert, (gate_up, down, seen, others) in enumerate(_experts(block, tokens)):
            total += _forward(gate_up, (2 + backward) * seen + others)
            total += _forward(down, (1 + 2 * backward) * seen)
            total += sum(_curves(stage, seen, others, expert == 0, effort) for stage in (gate_up, down))
    head = (architecture.head,)
    return total + _forward(head, 2 * backward * tokens) + _curves(head, tokens, 0, True, effort)


def quantizing_operations(
    architecture: Architecture, tokens: int, effort: Effort, repair: bool, refit: bool = False
) -> float:
    """Operations of quantizing once, on a number of tokens."""
    total = _solving((architecture.head,), tokens, effort, False)
    if refit:  # target outputs, products of channels, loss
        total += sum(6 * spec.shape[1] * spec.shape[0] ** 2 for spec in architecture.linears())
    for block in architecture.blocks:
        for stage in block.stages:
            total += _forward(stage, (3 if repair else 2) * tokens) + _solving(stage, tokens, effort, repair)
        for gate_up, down, seen, others in _experts(block, tokens):
            passes = 4 if repair else 2
            total += _forward(gate_up, passes * seen + others) + _forward(down, passes * seen)
            total += _solving(gate_up, seen + others, effort, repair)
            total += _solving(down, seen + others, effort, repair)
    return total


Stage = Sequence[LinearSpec]  # linears with the same inputs


def _experts(block: BlockSpec, tokens: int) -> list[tuple[Stage, Stage, float, float]]:
    """For each expert: both stages, its tokens, and those of others that serve as a prior."""
    if block.experts is None:
        return []
    seen = tokens * block.experts.active / block.experts.count
    others = min(PRIOR_TOKENS, tokens - seen)
    return [((gate, up), (down,), seen, others) for gate, up, down in block.experts.linears]


def _forward(stage: Stage, tokens: float) -> float:
    """Also what one product of the backward pass takes."""
    return sum(2 * tokens * math.prod(spec.shape) for spec in stage)


def _curves(stage: Stage, tokens: float, others: float, first: bool, effort: Effort) -> float:
    """Moments, factor and curves of linears; the first of a role in a block has trials to choose from."""
    k, sample = stage[0].shape[0], min(stage[0].shape[1], SAMPLE_COLUMNS)
    trials = len(DAMPINGS) + (len(PRIORS) - 1 if others else 0)
    total = 2 * (tokens + others) * k * k + k**3 / 3
    total += len(stage) * sample * (2 * k * k + SEARCHED * k * len(WIDTHS) * len(GROUP_ROWS))
    if first:
        total += trials * (k**3 / 3 + sample * (3 * k * k + SOLVED["fast"] * k))
        total += len(FEEDBACK_WIDTHS) * sample * (k * k + SOLVED[effort] * k)
    return total


def _solving(stage: Stage, tokens: float, effort: Effort, repair: bool) -> float:
    """Moments, factor and solutions of linears, and the repair of those that are repaired."""
    k, n = stage[0].shape[0], sum(spec.shape[1] for spec in stage)
    total = 2 * tokens * k * k + k**3 / 3 + n * k * (k + SOLVED[effort])
    if repair and stage[0].writes_stream:
        total += 4 * tokens * k * n + 2 * k**3 / 3 + 6 * n * k * k
    return total
