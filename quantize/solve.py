"""Quantizing linears that share their inputs: from moments and dense weights to tensors as they are stored.

Axes: K input channels, N output channels, G groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dbrx_quant.calibration.hessian import Moments
from dbrx_quant.quantize.ldlq import Effort, quantize_matrix
from dbrx_quant.quantize.prepare import Prepared, prepare, sampled_energy
from dbrx_quant.quantize.refit import ResidualTarget, cross_moments, loss_of, refitted
from dbrx_quant.quantize.shrinkage import Shrinkage, hessian
from dbrx_quant.runtime import _native
from dbrx_quant.runtime.format import (
    Group,
    GroupMap,
    UnpackedLinear,
    pack_linear,
    padded_columns,
    write_groups,
)


@dataclass(frozen=True)
class Solved:
    """One quantized linear.

    Attributes:
        name: of the linear.
        tensors: as stored, by suffix, without a bias; N padded to a multiple of 32.
        loss: tr(E^T H E).
        energy: tr(W^T H W), to which reports relate it.
    """

    name: str
    tensors: dict[str, Tensor]
    loss: float
    energy: float


def solve_linears(
    weights: Mapping[str, Tensor],
    groups: Mapping[str, GroupMap],
    moments: Moments,
    prior: Moments | None,
    shrinkage: Shrinkage,
    effort: Effort,
    refit: bool = False,
    target: ResidualTarget | None = None,
) -> Iterator[Solved]:
    """Quantize linears that share their inputs, one after the other.

    Args:
        weights: name → [N, K] float32.
        groups: name → group map.
        moments: of their inputs.
        prior: of other tokens, for experts.
        shrinkage: how the Hessian is regularised.
        effort: of the solver.
        refit: whether the maxima of the groups are fitted once more when the codes are fixed.
        target: what a single linear that writes into the residual stream is refitted to.

    Raises:
        ValueError: a moment is not finite.
    """
    moments.check(next(iter(weights)))
    matrix = hessian(moments, prior, shrinkage)
    energies = {name: sampled_energy(weight, matrix) for name, weight in weights.items()}
    prepared = prepare(matrix)
    del matrix  # a big one: its memory is for the solver now
    for name, weight in weights.items():
        tensors, loss = solve_linear(weight, prepared, groups[name], effort)
        if refit:
            undamped = hessian(moments, prior, replace(shrinkage, damping=0.0))
            wanted = cross_moments(weight, undamped, target, moments, prior, shrinkage)
            tensors["q_scale_max"] = refitted(tensors, undamped, wanted)
            del undamped, wanted
            loss = loss_of(tensors, weight, hessian(moments, prior, shrinkage))
        yield Solved(name, tensors, loss, energies[name])


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
        Its tensors as stored (N padded to a multiple of 32), and tr(E^T H E).
    """
    n = weight.shape[0]
    missing = padded_columns(n) - n
    ordered = torch.nn.functional.pad(weight.T[prepared.permutation], (0, missing))
    solved = quantize_matrix(ordered, prepared.factor, groups, effort=effort)
    unpacked = UnpackedLinear(
        solved.codes, solved.scale_codes, solved.scale_max, groups, prepared.permutation
    )
    return pack_linear(unpacked, _pack_codes), solved.loss


def _pack_codes(codes: Tensor, groups: Sequence[Group]) -> Tensor:
    return _native.pack_codes(codes, write_groups(groups), sum(group.word_rows for group in groups))
