"""A stage of a block quantized: its linears repaired, solved, and read back for what comes after them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.stages import Stage
from dbrx_quant.quantize.solve.linear import Solver
from dbrx_quant.quantize.solve.repair import Repair
from dbrx_quant.runtime.families.facts import LinearSpec, load_bias


@dataclass(frozen=True)
class StageSolver:
    """Quantizes the linears of stages.

    Attributes:
        model: the source.
        solver: what solves and writes linears.
        repair: how linears that write into the residual stream make good what it has lost.
    """

    model: StreamedModel
    solver: Solver
    repair: Repair

    def quantize(self, stage: Stage) -> None:
        """Quantize the linears of a stage that are not finished yet, and continue with what all decode to."""
        if todo := self.solver.files.unfinished(stage.specs):
            self._solve(stage, todo)
        stage.finish(self.solver.files.weight)

    def _solve(self, stage: Stage, todo: Sequence[LinearSpec]) -> None:
        dense, inputs, residual = stage.collect(todo)
        weights, target = self.repair.aim(dense, residual, self.solver.refit)
        del dense, residual  # big, and used up
        biases = [load_bias(self.model.checkpoint, spec) for spec in todo]
        self.solver.solve(todo, weights, biases, inputs.joined(), inputs.prior, target)
