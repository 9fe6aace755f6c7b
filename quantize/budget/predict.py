"""The KL divergence that an allocation will have: the original's own blocks, with noise in place of rounding.

A measurement prices each linear alone, to second order and on calibration text. What that leaves out: all
errors act at once, so tokens change experts (on a small DBRX a fifth to two fifths more) and logits saturate
(on SmolLM2-135M a fifth less); and errors are larger on other text. So a few rows go through the original
twice, the second time with normal noise on every linear's output, as strong as the error that its option has
on held-out tokens, and the heads tell how far apart they end.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.calibration.blocks.head import distance
from dbrx_quant.calibration.blocks.model import LiveBlock, StreamedModel
from dbrx_quant.calibration.blocks.states import new_states, open_states
from dbrx_quant.calibration.blocks.walk import Through, batches, route, turns, unchanged
from dbrx_quant.quantize.budget.strategy import Strategy
from dbrx_quant.quantize.measurement import Measurement
from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.output.progress import bar

# KL of finished models over that of noise, mean of two models on text that was not calibrated on. Errors of
# rounding lean against the weights, which costs more than noise does; the repair takes something off.
SIZES = (2.5, 3.0, 4.25)  # bits per weight
REPAIRED = (0.91, 1.03, 1.16)
UNREPAIRED = (1.05, 1.17, 1.22)


def over_noise(bpw: float, repaired: bool) -> float:
    """KL of a finished model relative to that of noise, at a number of bits per weight."""
    return float(np.interp(bpw, SIZES, REPAIRED if repaired else UNREPAIRED))


class Predictor:
    """Predictions for one model from the same rows.

    Args:
        model: the source.
        measurement: of the model.
        tokens: [R, L] int64 ids of rows to run.
        folder: for hidden states.
        seed: of the noise.
        quiet: show no progress.
    """

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        tokens: Tensor,
        folder: Path,
        seed: int = 0,
        quiet: bool = True,
    ) -> None:
        self._model, self._linears, self._tokens = model, measurement.linears, tokens
        self._seed, self._quiet = seed, quiet
        self._original, self._noisy = folder / "original.safetensors", folder / "noisy.safetensors"

    def kl(self, strategy: Strategy, repaired: bool) -> tuple[float, float | None]:
        """KL divergence in nats per token, and its standard error over the rows (None: there is one row).

        Args:
            strategy: the options of all linears.
            repaired: whether the residual stream will be repaired.
        """
        generator = torch.Generator().manual_seed(self._seed)

        def noisy(output: Tensor, spec: LinearSpec) -> Tensor:
            cost, measured = strategy.choices[spec.name].error, self._linears[spec.name]
            if not cost:
                return output
            error = cost / measured.price * measured.held_out_ratio  # squared, sum over channels
            noise = torch.randn(output.shape, generator=generator).to(output.device)  # the same on all
            return output + noise.mul_((error / output.shape[-1]) ** 0.5)

        with torch.no_grad():
            if not self._original.exists():
                self._run(self._original, unchanged)
            self._run(self._noisy, noisy)
            device = self._model.device
            exact, disturbed = open_states(self._original, device), open_states(self._noisy, device)
            head = self._model.architecture.head
            weight = self._model.dense(head)
            scores = distance(
                self._model,
                disturbed,
                exact,
                weight,
                weight,
                self._tokens,
                lambda logits: noisy(logits, head),
            )
        factor = over_noise(strategy.bpw, repaired)
        return factor * scores.kl, scores.kl_stderr and factor * scores.kl_stderr

    def _run(self, path: Path, noise: Through) -> None:
        """Write the states after the last block."""
        blocks, hidden = self._model.architecture.blocks, self._model.architecture.hidden
        with (
            new_states(path, (*self._tokens.shape, hidden)) as states,
            bar(len(blocks), "predict", self._quiet) as progress,
        ):
            for part in batches(states):
                states[part] = self._model.embed(self._tokens[part])
            for block in blocks:
                live = self._model.block(block.index)
                _disturb(live, noise)
                if block.experts:
                    self._run_experts(live, block.experts, states, noise)
                else:
                    for part in batches(states):
                        states[part] = live(states[part])[0]
                progress.step(f"{'original' if noise is unchanged else 'with noise'}, block {block.index}")

    def _run_experts(self, live: LiveBlock, experts: ExpertsSpec, states: Tensor, noise: Through) -> None:
        stream = states.view(-1, states.shape[-1])
        routing = route(live, states, states, torch.empty_like(stream))
        for turn in turns(routing, experts):
            if turn.count:  # all tokens at once, so that noise does not depend on how they are cut into spans
                turn.add_to(stream, turn.narrowed(self._model), noise, at_once=True)


def _disturb(live: LiveBlock, noise: Through) -> None:
    """Let the outputs of a block's linears, experts aside, go through `noise`."""
    for stage in live.spec.stages:
        for spec in stage:

            def hook(_: Any, inputs: Any, output: Tensor, spec: LinearSpec = spec) -> Tensor:
                begin, end = spec.outputs or (0, spec.shape[1])
                output = output.clone()
                output[..., begin:end] = noise(output[..., begin:end], spec)
                return output

            live.submodule(spec).register_forward_hook(hook)
