"""Quantizing linears that share their inputs: from moments and dense weights to their finished files.

Axes: K input channels, N output channels, G groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize.solve.ldlq import Effort, quantize_matrix
from dbrx_quant.quantize.solve.prepare import Prepared, prepare, sampled_energy
from dbrx_quant.quantize.solve.refit import ResidualTarget, cross_moments, loss_of, refitted
from dbrx_quant.runtime.exl2.format import (
    Group,
    GroupMap,
    UnpackedLinear,
    pack_linear,
    padded_columns,
    write_groups,
)
from dbrx_quant.runtime.exl2.group_text import parse_groups
from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.shards.linear_files import LinearFiles

_OUTPUTS = 1024  # that are put in order at once


@dataclass(frozen=True)
class Solver:
    """Quantizes linears and writes them.

    Attributes:
        files: where finished linears go.
        groups: linear → group map as text.
        shrinkage: linear → how its Hessian is regularised.
        effort: how long to look for codes and scales.
        refit: whether the maxima of each linear's groups are fitted once more when its codes are fixed.
    """

    files: LinearFiles
    groups: Mapping[str, str]
    shrinkage: Callable[[str], Shrinkage]
    effort: Effort = "default"
    refit: bool = False

    def solve(
        self,
        specs: Sequence[LinearSpec],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        moments: Moments,
        prior: Moments | None = None,
        target: ResidualTarget | None = None,
    ) -> None:
        """Quantize linears that share their inputs, and write the file of each as soon as it is solved.

        A file's metadata has the `loss` tr(E^T H E) and the `energy` tr(W^T H W), to which reports relate it.

        Args:
            specs: the linears.
            weights: [N, K] float32 of each, what is quantized.
            biases: [N] of each, or None.
            moments: of their inputs.
            prior: of other tokens, for experts.
            target: what a single linear that writes into the residual stream is refitted to.

        Raises:
            ValueError: a moment is not finite.
        """
        moments.check(specs[0].name)
        shrinkage = self.shrinkage(specs[0].name)
        matrix = hessian(moments, prior, shrinkage)
        energies = [sampled_energy(weight, matrix) for weight in weights]
        prepared = prepare(matrix)
        del matrix  # a big one: its memory is for the solver now
        for spec, weight, bias, energy in zip(specs, weights, biases, energies, strict=True):
            tensors, loss = solve_linear(weight, prepared, parse_groups(self.groups[spec.name]), self.effort)
            if self.refit:
                undamped = hessian(moments, prior, replace(shrinkage, damping=0.0))
                cross = cross_moments(weight, undamped, target, moments, prior, shrinkage)
                tensors["q_scale_max"] = refitted(tensors, undamped, cross)
                del undamped, cross
                loss = loss_of(tensors, weight, hessian(moments, prior, shrinkage))
            self.files.write(spec, tensors, bias, {"loss": repr(loss), "energy": repr(energy)})


def solve_linear(
    weight: Tensor, prepared: Prepared, groups: GroupMap, effort: Effort = "default"
) -> tuple[dict[str, Tensor], float]:
    """Quantize one linear and pack it.

    Args:
        weight: [N, K] float32.
        prepared: its Hessian's order and factor.
        groups: its group map.
        effort: of the solver.

    Returns:
        Its tensors as stored (N padded to a multiple of 32), on the host, and tr(E^T H E).
    """
    ordered = _ordered(weight, prepared.permutation)
    solved = quantize_matrix(ordered, prepared.factor, groups, effort=effort, overwrite=True)
    permutation = prepared.permutation.cpu()
    unpacked = UnpackedLinear(solved.codes, solved.scale_codes, solved.scale_max, groups, permutation)
    return pack_linear(unpacked, _pack_codes), solved.loss


def _ordered(weight: Tensor, permutation: Tensor) -> Tensor:
    """A weight [N, K] as rows in packed order, [K, N'] with N padded by zeros."""
    n, k = weight.shape
    ordered = torch.empty(k, padded_columns(n), device=weight.device)
    ordered[:, n:] = 0
    for start in range(0, n, _OUTPUTS):  # turned first, so that whole rows move: a seventh of the time
        part = weight[start : start + _OUTPUTS].T.contiguous()
        torch.index_select(part, 0, permutation, out=ordered[:, start : start + len(part.T)])
    return ordered


def _pack_codes(codes: Tensor, groups: Sequence[Group]) -> Tensor:
    return _native.pack_codes(codes, write_groups(groups), sum(group.word_rows for group in groups))
