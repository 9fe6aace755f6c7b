"""Measuring linears that share their inputs: from moments, gradients and dense weights to their entries.

Linears of one role in a block have much in common. How strongly a Hessian is regularised, and how far the
table of errors is off, is therefore found out for one expert and taken over from its entry by those like it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.shrinkage import hessian
from dbrx_quant.quantize.budget.curve import draw, feedback_factors, held_out_ratio
from dbrx_quant.quantize.entries import Entry
from dbrx_quant.quantize.measurement import LinearMeasurement
from dbrx_quant.quantize.solve.ldlq import Effort
from dbrx_quant.quantize.solve.prepare import prepare, sampled_energy
from dbrx_quant.quantize.solve.shrinkage import choose_shrinkage
from dbrx_quant.runtime.families.facts import LinearSpec


@dataclass(frozen=True)
class Likeness:
    """Names of the linears whose entries some others take results from; None: they find out themselves.

    Attributes:
        shrinkage: how their Hessian is regularised.
        feedback: the factor of the table of errors at each width.
    """

    shrinkage: str | None = None
    feedback: str | None = None


UNLIKE = Likeness()


@dataclass(frozen=True)
class Measurer:
    """Draws the curves of linears and writes them.

    Attributes:
        folder: of the entries.
        effort: what the linears will be solved with.
        scale: what a sum of squared gradients is multiplied with to be that of all calibration tokens.
    """

    folder: Path
    effort: Effort
    scale: float

    def entry(self, name: str) -> Path:
        """What was measured of one linear."""
        return self.folder / f"{name}.json"

    def unfinished(self, specs: Sequence[LinearSpec]) -> list[LinearSpec]:
        """The given linears that have no entry yet."""
        return [spec for spec in specs if not self.entry(spec.name).exists()]

    def measure(
        self,
        specs: Sequence[LinearSpec],
        moments: SplitMoments,
        held_out: HeldOutInputs,
        gradients: dict[str, GradientSum],
        weight_of: Callable[[LinearSpec], Tensor],
        like: Likeness = UNLIKE,
    ) -> None:
        """Write the entries of linears that share their inputs and have none yet; takes over the moments.

        Args:
            specs: the linears.
            moments: of their inputs.
            held_out: their inputs on held-out tokens.
            gradients: of each linear's output, by its name.
            weight_of: the float32 weight [N, K] of a linear.
            like: whose results they take over.
        """
        if not (todo := self.unfinished(specs)):
            return
        moments.check(specs[0].name)
        weight = weight_of(specs[0])
        if like.shrinkage is None:
            shrinkage = choose_shrinkage(weight, moments)
        else:
            shrinkage = Entry.read(self.entry(like.shrinkage)).linear.shrinkage
        joined = moments.joined()
        matrix = hessian(joined, moments.prior, shrinkage)
        energies = {spec.name: sampled_energy(weight_of(spec), matrix) for spec in todo}
        prepared = prepare(matrix)
        if like.feedback is None:
            columns = gradients[specs[0].name].column_weights()
            feedback: Sequence[float] = feedback_factors(weight, prepared, columns, self.effort)
        else:
            feedback = Entry.read(self.entry(like.feedback)).linear.feedback
        ratio = held_out_ratio(weight, prepared, held_out)
        for spec in todo:
            total = gradients[spec.name]
            columns, energy = total.column_weights(), energies[spec.name]
            curve = draw(weight_of(spec), prepared, columns, energy, feedback, spec.bias)
            measured = LinearMeasurement(
                role=spec.role,
                shape=spec.shape,
                options=curve.options,
                energy=curve.energy,
                tokens=joined.tokens,
                effective_tokens=joined.effective,
                weight=joined.weight,
                held_out_ratio=ratio,
                shrinkage=shrinkage,
                feedback=curve.feedback,
            )
            Entry(measured, total.total * self.scale).write(self.entry(spec.name))


def step(effective: float, k: int) -> int:
    """Tokens per channel of K, in steps of four times as many: linears of one step are regularised alike."""
    return round(math.log2(max(effective, 1.0) / k) / 2)
