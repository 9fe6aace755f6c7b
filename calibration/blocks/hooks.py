"""Sums over the inputs and output gradients of a block's linears, experts aside, while it runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dbrx_quant.calibration.blocks.model import LiveBlock
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.runtime.families.facts import LinearSpec


class Watch:
    """Sums up inputs and output gradients of a block's linears.

    Attributes:
        rows: the calibration row of each token that runs next; None: they are held-out ones.
        moments: of each stage's inputs.
        held_out: each stage's inputs on held-out tokens.
        gradients: of each linear's output, by its name.
    """

    def __init__(self, live: LiveBlock) -> None:
        self.rows: Tensor | None = None
        device = live.device
        self.moments = [SplitMoments.zero(stage[0].shape[0], device=device) for stage in live.spec.stages]
        self.held_out = [HeldOutInputs() for _ in live.spec.stages]
        self.gradients: dict[str, GradientSum] = {}
        self._handles: list[Any] = []
        for number, stage in enumerate(live.spec.stages):
            for spec in stage:
                self.gradients[spec.name] = GradientSum.zero(spec.shape[1], device)
            modules = {spec.module: live.submodule(spec) for spec in stage}
            for position, (owner, module) in enumerate(modules.items()):
                specs = [spec for spec in stage if spec.module == owner]
                hook = self._hook(specs, number if position == 0 else None)  # the others get the same
                self._handles.append(module.register_forward_hook(hook))

    def _hook(self, specs: list[LinearSpec], stage: int | None) -> Callable[..., None]:
        def see_gradient(gradient: Tensor) -> None:
            for spec in specs:
                begin, end = spec.outputs or (0, spec.shape[1])
                self.gradients[spec.name].add(gradient[..., begin:end])

        def see_output(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if stage is not None:
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                if self.rows is None:
                    self.held_out[stage].add(x)
                else:
                    self.moments[stage].add(x, self.rows)
            if output.requires_grad:
                output.register_hook(see_gradient)  # type: ignore[no-untyped-call]

        return see_output

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
