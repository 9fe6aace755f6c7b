"""Maxima fitted once more bring a linear's outputs nearer to what is wanted, and change nothing else."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import random_tokens, save_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import open_states
from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian, own_share
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.second_pass import QuantizeJob, quantize_model
from dbrx_quant.quantize.solve.linear import solve_linear
from dbrx_quant.quantize.solve.prepare import prepare
from dbrx_quant.quantize.solve.refit import ResidualTarget, cross_moments, loss_of, refitted
from dbrx_quant.runtime.exl2.format import Group, dequantize_linear
from dbrx_quant.runtime.output.progress import Progress

K, N, TOKENS = 96, 40, 400
GROUPS = (Group(3, 32), Group(2, 32), Group(2, 32))


@pytest.fixture(scope="module")
def solved():
    """Inputs, a dense weight, wanted outputs that are not quite its own, and its stored tensors."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    weight = torch.randn(N, K, generator=generator)
    outputs = 1.1 * x @ weight.T + 0.1 * torch.randn(TOKENS, N, generator=generator)
    tensors, _ = solve_linear(weight, prepare(hessian(moments(x), None, Shrinkage(0.05))), GROUPS)
    return x, weight, outputs, tensors


def moments(x):
    found = Moments.zero(x.shape[1])
    found.add(x)
    return found


def parts(tensors):
    """[G, N, K] float64: the weight that each group holds."""
    found = []
    for g in range(len(GROUPS)):
        alone = tensors["q_scale_max"].clone()
        alone[torch.arange(len(GROUPS)) != g] = 0
        found.append(dequantize_linear({**tensors, "q_scale_max": alone})[:N].double())
    return torch.stack(found)


def test_the_new_maxima_are_the_least_squares_solution_over_the_tokens(solved):
    x, _, outputs, tensors = solved
    new = refitted(tensors, x.T @ x / TOKENS, outputs.T @ x / TOKENS)
    design = torch.einsum("tk,gnk->tng", x.double(), parts(tensors)).reshape(-1, len(GROUPS))
    factors = torch.linalg.lstsq(design, outputs.double().reshape(-1, 1)).solution[:, 0]
    assert (factors - 1).abs().min() > 0.02
    torch.testing.assert_close(new.double(), factors * tensors["q_scale_max"].double(), rtol=2e-3, atol=0.0)
    assert new.dtype == torch.float16
    before, after = (
        (x @ dequantize_linear({**tensors, "q_scale_max": m})[:N].float().T - outputs).square().sum()
        for m in (tensors["q_scale_max"], new)
    )
    assert after < 0.9 * before


def test_maxima_stay_where_inputs_are_dead_and_move_by_a_factor_of_two_at_most(solved):
    x, _, outputs, tensors = solved
    old = tensors["q_scale_max"]
    assert torch.equal(refitted(tensors, torch.zeros(K, K), torch.zeros(N, K)), old)
    matrix, cross = x.T @ x / TOKENS, outputs.T @ x / TOKENS
    assert torch.equal(refitted(tensors, matrix, -cross), (old.double() / 2).half())
    assert torch.equal(refitted(tensors, matrix, 10 * cross), (old.double() * 2).half())


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_a_linear_in_the_stream_aims_at_what_the_stream_lacks_by_its_own_tokens(solved, prior):
    x, weight, _, _ = solved
    generator = torch.Generator().manual_seed(4)
    missing, others = torch.randn(TOKENS, N, generator=generator), 3 * torch.randn(50, K, generator=generator)
    own, shrinkage = moments(x), Shrinkage(0.0, prior)
    other = moments(others)
    matrix = hessian(own, other, shrinkage)
    found = cross_moments(0 * weight, matrix, ResidualTarget(weight, missing.T @ x), own, other, shrinkage)
    share = TOKENS / (TOKENS + prior * K)
    assert own_share(own, other, shrinkage) == pytest.approx(share)
    exact = share * (x @ weight.T + missing).T @ x / TOKENS + (1 - share) * weight @ others.T @ others / 50
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(cross_moments(weight, matrix, None, own, other, shrinkage), weight @ matrix)


@pytest.fixture(scope="module", params=["dbrx", "llama tied and biased"])
def jobs(request, tmp_path_factory):
    """The same quantization without and with the refit, both finished."""
    folder = tmp_path_factory.mktemp("refit")
    model, ids = StreamedModel(save_model(folder / "model", request.param, std=0.2)), random_tokens(16, 64)
    measurement = measure(MeasureJob(model, ids, folder / "measure", Progress()))
    groups = {name: option.groups for name, option in allocate(measurement, 3.0, 6).choices.items()}
    job = QuantizeJob(model, ids, folder / "without", measurement, groups, Progress())
    refit = dataclasses.replace(job, folder=folder / "with", refit=True)
    quantize_model(job)
    quantize_model(refit)
    return job, refit


def test_the_first_linears_differ_in_their_maxima_alone(jobs):
    for spec in jobs[0].model.architecture.blocks[0].stages[0]:
        before, after = (load_file(job.linears.path(spec.name)) for job in jobs)
        different = {name for name in before if not torch.equal(before[name], after[name])}
        assert different == {f"{spec.name}.q_scale_max"}


def test_the_stream_of_a_refitted_model_is_nearer_to_the_originals(jobs):
    count = len(jobs[0].model.architecture.blocks)
    original = open_states(jobs[0].folder.parent / "measure" / f"states-{count:03}.safetensors")[:]
    without, refit = (float((open_states(job.states(count))[:] - original).square().sum()) for job in jobs)
    assert refit < without


def test_the_loss_on_file_is_that_of_the_refitted_linear(jobs):
    job, spec = jobs[1], jobs[1].model.architecture.blocks[0].stages[0][0]
    weight, seen = job.model.dense(spec), []
    live = job.model.block(0)
    live.submodule(spec).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        live(job.model.embed(job.tokens))
    matrix = hessian(moments(seen[0]), None, job.measurement.linears[spec.name].shrinkage)
    with safe_open(job.linears.path(spec.name), "pt") as opened:
        told = float(opened.metadata()["loss"])
        tensors = {name.rpartition(".")[2]: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    error = (weight - dequantize_linear(tensors)[: spec.shape[1]]).double()
    exact = float((error @ matrix.double() * error).sum())
    assert told == pytest.approx(exact, rel=1e-3)
    assert loss_of(tensors, weight, matrix) == pytest.approx(exact, rel=1e-3)
