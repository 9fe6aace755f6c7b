"""The steps of measuring and quantizing that take time, and what they have to do at least.

Operations are what the method needs: of symmetric products and factors half, of the solver's loops all that
is computed for a weight, one by one. Bytes are those of the big tensors, read once and written once.

Axes: T tokens, K input channels, N output channels, G groups.
"""

import math
from collections.abc import Mapping
from typing import Any

from dbrx_quant.quantize.solve.grid import MAXIMA, NOMINALS
from dbrx_quant.quantize.solve.ldlq import _CODE_STEPS, _PATH_STEPS, _PATHS, EFFORTS
from dbrx_quant.scripts.full_size.step_clock import Step

# Operations to judge a value on a grid: divided, held between bounds, rounded, its miss squared and weighed.
JUDGED = 9
SCALES_JUDGED = NOMINALS + 2 * MAXIMA + 4  # of a value's column, in the three steps of the search (`grid`)
ROUNDED = JUDGED + 2  # to a half, too
SORTED = 60  # operations to find the best half of twice as many paths

Call = Mapping[str, Any]


def solving(call: Call) -> float:
    """Operations of rounding a block of groups."""
    n, rows_of_block, effort = call["weight"].shape[1], sum(call["rows"]), EFFORTS[call["effort"]]
    total = 0
    for rows in call["rows"]:
        nearest = ROUNDED + rows  # a product and a sum for each row before it: half of the group on average
        paths = _PATHS * (2 * ROUNDED + rows) + SORTED
        work = JUDGED * SCALES_JUDGED + rows_of_block  # likewise, of the groups before it
        if effort == "fast":
            work += nearest
        else:
            work += len(_CODE_STEPS) * nearest + paths
        if effort == "best":
            work += len(_PATH_STEPS) * paths
        total += work * rows * n
    return float(total)


def table(call: Call) -> float:
    """Operations of the errors of all groups at several widths."""
    return float(call["weight"].numel() * len(call["bits"]) * JUDGED * SCALES_JUDGED)


def moments(call: Call) -> float:
    """Operations of the sum of x x^T, of which a half is the other half's mirror image."""
    t, k = call["x"].shape
    return float(t * k * (k + 1))


def hessian(call: Call) -> float:
    """Bytes of reading moments and writing a Hessian."""
    read = 1 + (call["prior"] is not None)
    return 4.0 * (read + 1) * int(call["moments"].upper.numel())


def stored(call: Call) -> float:
    """Bytes of a linear's file."""
    return float(call["self"].path(call["spec"].name).stat().st_size)


def _step(name: str, place: str, **more: Any) -> Step:
    return Step(name, f"dbrx_quant.{place}", **more)


STEPS = (
    _step(
        "loading weights",
        "calibration.blocks.model:StreamedModel.dense",
        moved=lambda call: 6 * math.prod(call["spec"].shape),
    ),
    _step("attention forward", "calibration.blocks.model:LiveBlock.__call__"),
    Step("attention backward", "torch.autograd:backward"),
    _step("experts forward", "calibration.blocks.walk:Turn.inner"),
    _step("experts forward", "calibration.blocks.walk:Turn.shares"),
    _step("experts forward and backward", "quantize.budget.expert:MeasuredExperts._back"),
    _step(
        "squared gradients",
        "calibration.statistics.fisher:GradientSum.add",
        moved=lambda call: 4 * call["gradient"].numel(),
    ),
    _step(
        "tokens gathered",
        "calibration.blocks.walk:Turn._span",
        moved=lambda call: 8 * call["result"].x.numel() if call["result"] else 0,
    ),
    _step(
        "tokens split",
        "calibration.statistics.moments:SplitMoments.add",
        moved=lambda call: 8 * call["x"].numel(),
    ),
    _step("prior", "calibration.statistics.moments:SplitMoments.add_prior", scope=True),
    _step("moments", "calibration.statistics.moments:Moments.add", operations=moments),
    _step(
        "moments zeroed",
        "calibration.statistics.moments:Moments.zero",
        moved=lambda call: 4 * call["k"] ** 2,
    ),
    _step("moments joined", "calibration.statistics.moments:SplitMoments.joined"),
    _step("outputs compared", "calibration.blocks.stages:DownStage._look"),
    _step("outputs compared", "calibration.blocks.stages:ComparedStage._look"),
    _step("residual moments", "calibration.statistics.residual:ResidualMoments.add"),
    _step("Hessian", "calibration.statistics.shrinkage:hessian", moved=hessian),
    _step("energy", "quantize.solve.prepare:energy"),
    _step(
        "Hessian ordered",
        "quantize.solve.prepare:prepare",
        moved=lambda call: 8 * call["matrix"].numel(),
    ),
    _step(
        "factorisation",
        "quantize.solve.ldlq:factorize",
        operations=lambda call: call["hessian"].shape[0] ** 3 / 3,
    ),
    _step("shrinkage trials", "quantize.solve.shrinkage:choose_shrinkage", scope=True, once=True),
    _step("feedback trials", "quantize.budget.curve:feedback_factors", scope=True, once=True),
    _step("held-out trial", "quantize.budget.curve:held_out_ratio", scope=True),
    _step("error tables", "quantize.solve.native:error_table", operations=table),
    _step("curves", "quantize.budget.curve:draw"),
    _step("feedback products", "quantize.solve.ldlq:quantize_matrix"),
    _step("code search", "quantize.solve.native:solve_block", operations=solving),
    _step(
        "weights ordered", "quantize.solve.linear:solve_linear", moved=lambda call: 8 * call["weight"].numel()
    ),
    _step(
        "packing",
        "runtime.exl2.format:pack_linear",
        moved=lambda call: call["unpacked"].codes.numel() + 4 * call["result"]["q_weight"].numel(),
    ),
    _step("writing linears", "runtime.shards.linear_files:LinearFiles.write", moved=stored),
    _step(
        "reading linears back",
        "runtime.shards.linear_files:LinearFiles.weight",
        moved=lambda call: stored(call) + 4 * math.prod(call["spec"].shape),
    ),
    _step("repair", "quantize.solve.repair:repaired", scope=True),
    _step("triangular solves", "quantize.solve.repair:solve"),
    _step("shares on disk", "calibration.blocks.shares:shares_of"),
    _step("shares added", "calibration.blocks.shares:add_shares"),
    _step("outputs compared", "calibration.blocks.shares:Missing.behind"),
    _step(
        "states written",
        "calibration.blocks.states:new_states",
        moved=lambda call: 2 * math.prod(call["shape"]),
    ),
    _step(
        "states checked",
        "calibration.blocks.walk:check_states",
        moved=lambda call: 4 * call["states"].numel(),
    ),
    _step("seals", "runtime.files.sealed:sha256", moved=lambda call: call["path"].stat().st_size),
)
