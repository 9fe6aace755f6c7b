"""The experts of a block quantized: each sees the quantized linears of no other one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dbrx_quant.calibration.blocks.crew import Description, Result
from dbrx_quant.calibration.blocks.model import Routing
from dbrx_quant.calibration.blocks.shares import Missing
from dbrx_quant.calibration.blocks.stages import expert_stages
from dbrx_quant.calibration.blocks.walk import Turn
from dbrx_quant.quantize.solve.stage import StageSolver
from dbrx_quant.runtime.families.facts import ExpertsSpec


@dataclass(frozen=True)
class SolvedExperts:
    """A task: an expert's finished linears, and what it adds to the stream with them.

    Attributes:
        stages: what quantizes.
        block: whose experts they are.
        experts: all of them.
        routing: of all tokens, with the experts' inputs, those to calibrate on first.
        length: tokens of a row.
        seen: how many tokens are calibrated on.
        missing: what the stream misses of the original's, if it is compared with it.
        folder: for files while it runs.
    """

    KIND: ClassVar[str] = "solve"

    stages: StageSolver
    block: int
    experts: ExpertsSpec
    routing: Routing
    length: int
    seen: int
    missing: Missing | None
    folder: Path

    def do(self, turn: Turn) -> Result:
        """Quantize an expert; its shares of all tokens, the fields of `States` by name."""
        rows = torch.arange(len(self.routing.index)) // self.length
        gate_up, down = expert_stages(self.stages.model, turn, self.seen, rows, self.missing)
        self.stages.quantize(gate_up)
        self.stages.quantize(down)
        return down.shares(self.folder).tensors

    def products(self, turn: Turn) -> Sequence[Path]:
        """The finished linears."""
        return [self.stages.solver.files.path(spec.name) for spec in turn.linears]

    def only_here(self, turn: Turn) -> bool:
        """Whether one of its linears is in shards already, which nobody else reads."""
        files = self.stages.solver.files
        todo = {spec.name for spec in files.unfinished(turn.linears)}
        return any(not files.path(s.name).exists() and s.name not in todo for s in turn.linears)

    def described(self) -> Description:
        """What others make it of."""
        solver, names = self.stages.solver, [s.name for linears in self.experts.linears for s in linears]
        facts = {
            "length": self.length,
            "seen": self.seen,
            "groups": {name: solver.groups[name] for name in names},
            "shrinkage": {name: vars(solver.shrinkage(name)) for name in names},
            "effort": solver.effort,
            "refit": solver.refit,
            "ridge": self.stages.repair.ridge,
            "compared": self.missing is not None,
        }
        tensors = (
            {} if self.missing is None else {**self.missing.states.tensors, "squares": self.missing.squares}
        )
        files = [path for name in names if (path := solver.files.path(name)).exists()]
        return Description(self.KIND, self.block, facts, tensors, files, {"linears": solver.files.folder})
