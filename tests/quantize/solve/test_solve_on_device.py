"""From sums over tokens to a solved linear, another device computes what the CPU does."""

import pytest
import torch
from far_device import both, drawn, same

from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize.budget.curve import draw, feedback_factors, held_out_ratio
from dbrx_quant.quantize.solve.ldlq import factorize
from dbrx_quant.quantize.solve.linear import solve_linear
from dbrx_quant.quantize.solve.prepare import prepare, sampled_energy
from dbrx_quant.quantize.solve.refit import ResidualTarget, cross_moments, loss_of, refitted
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, repaired
from dbrx_quant.quantize.solve.shrinkage import choose_shrinkage
from dbrx_quant.runtime.exl2.format import uniform_groups
from dbrx_quant.runtime.kernels.device import CPU

K, N, TOKENS = 96, 64, 1024
ROWS = torch.arange(TOKENS) // 8  # of each token


X, WEIGHTS = drawn(TOKENS, K) @ drawn(K, K, seed=1), drawn(TOKENS, seed=2).square()


def summed(device):
    """Moments of correlated inputs with routing weights."""
    moments = SplitMoments.zero(K, prior=True, device=device)
    moments.add(X.to(device), ROWS, WEIGHTS.to(device))
    moments.add_prior(drawn(100, K, seed=3).to(device))
    moments.check("these")
    return moments


def compared(device):
    """Moments with what the stream misses behind them."""
    moments = summed(device)
    residual = ResidualMoments(moments, K, N)
    missing = X @ drawn(K, N, seed=4) + drawn(TOKENS, N, seed=5)
    residual.add(X.to(device), missing.to(device), ROWS, WEIGHTS.sqrt().to(device))
    return residual


def test_sums_over_tokens_are_the_cpus():
    def compute(device):
        moments, gradients = summed(device), GradientSum.zero(N, device)
        gradients.add(drawn(TOKENS, N).to(device))
        residual, held_out = compared(device), HeldOutInputs()
        held_out.add(drawn(50, K).to(device))
        error = held_out.error(drawn(K, 7).to(device))
        joined = moments.joined()
        matrices = [hessian(joined, moments.prior, Shrinkage(0.1, 0.5)), residual.fit, residual.selection]
        return [*matrices, gradients.column_weights(), gradients.total, joined.effective, error]

    same(*both(compute))


def test_what_comes_of_no_tokens_is_on_the_device_too():
    def compute(device):
        nothing = hessian(SplitMoments.zero(8, device=device).fit, None, Shrinkage(0.1))
        columns = GradientSum.zero(8, device).column_weights()
        assert nothing.device == columns.device == device
        return [nothing, columns]

    same(*both(compute))


def test_shrinkage_factor_and_energy_are_the_cpus():
    def compute(device):
        moments, weight = summed(device), drawn(N, K).to(device)
        chosen = choose_shrinkage(weight, moments)
        matrix = hessian(moments.fit, moments.prior, chosen)
        energy = sampled_energy(weight, matrix)
        factor = factorize(matrix)
        prepared = prepare(matrix)
        return [chosen, energy, factor.unit_upper, factor.pivots, prepared.permutation]

    same(*both(compute))


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_a_solved_and_refitted_linear_is_the_cpus(effort):
    def compute(device):
        moments, weight = summed(device), drawn(N, K).to(device)
        shrinkage = Shrinkage(0.1, 0.5)
        joined = moments.joined()
        matrix = hessian(joined, moments.prior, shrinkage)
        tensors, loss = solve_linear(weight, prepare(matrix.clone()), uniform_groups(K, 3, 32), effort)
        target = ResidualTarget(weight, drawn(N, K, seed=6).to(device))
        cross = cross_moments(weight, matrix, target, joined, moments.prior, shrinkage)
        maxima = refitted(tensors, matrix, cross)
        assert all(tensor.device == CPU for tensor in (*tensors.values(), maxima))
        return [*tensors.values(), loss, maxima, loss_of(tensors, weight, matrix)]

    same(*both(compute))


def test_a_repaired_weight_is_the_cpus():
    here, there = both(lambda device: [repaired(drawn(N, K).to(device), compared(device), DEFAULT_REPAIR)])
    assert not torch.equal(here[0], drawn(N, K)), "repaired at all"
    same(here, there)


def test_a_curve_is_the_cpus():
    def compute(device):
        moments, weight, held_out = summed(device), drawn(200, K).to(device), HeldOutInputs()
        columns = drawn(200, seed=7).square().to(device)
        held_out.add(drawn(50, K).to(device))
        matrix = hessian(moments.joined(), None, Shrinkage(0.1))
        energy, prepared = sampled_energy(weight, matrix), prepare(matrix)
        factors = feedback_factors(weight, prepared, columns)
        curve = draw(weight, prepared, columns, energy, factors)
        return [factors, curve, held_out_ratio(weight, prepared, held_out)]

    same(*both(compute))
