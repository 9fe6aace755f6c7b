"""Linears that write into the residual stream are changed so that it comes nearer to the original's."""

import dataclasses

import pytest
import torch
from small_models import random_tokens, save_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import open_states
from dbrx_quant.calibration.statistics.moments import MIN_SELECTION_TOKENS, SplitMoments, is_selection
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.quantize import second_pass
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.second_pass import QuantizeJob, quantize_model
from dbrx_quant.quantize.solve.ldlq import factorize
from dbrx_quant.quantize.solve.repair import NO_REPAIR, Repair, repaired, solve
from dbrx_quant.runtime.output.progress import Progress

K, N, LENGTH = 24, 10, 64


def draw(rows, noise, seed=0):
    """Inputs, routing weights, what is missing (half of it a linear function of the inputs), and rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows * LENGTH, K, generator=generator) @ torch.randn(K, K, generator=generator)
    p = torch.rand(rows * LENGTH, generator=generator)
    change = torch.randn(N, K, generator=generator)
    missing = p[:, None] * (x @ change.T) + noise * torch.randn(rows * LENGTH, N, generator=generator)
    return x, p, missing, torch.arange(rows).repeat_interleave(LENGTH)


def summed(x, p, missing, rows):
    inputs = SplitMoments.zero(K)
    moments = ResidualMoments(inputs, K, N)
    for part in (slice(0, 100), slice(100, None)):
        inputs.add(x[part], rows[part], None if p is None else p[part].square())
        moments.add(x[part], missing[part], rows[part], None if p is None else p[part])
    return moments


def ridge_regression(x, r, ridge, total):
    """The change with the least |r - x change^T|^2 + ridge |change|^2, from stacked equations in float64."""
    mean_square = float(x.square().sum() / K / total)
    rows = (ridge * mean_square * total) ** 0.5 * torch.eye(K, dtype=torch.float64)
    stacked, right = torch.cat([x, rows]), torch.cat([r, torch.zeros(K, N, dtype=torch.float64)])
    return torch.linalg.lstsq(stacked, right).solution.T


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("noise", [0.5, 30.0, 300.0])
def test_the_change_is_a_ridge_regression_as_strong_as_selection_tokens_like_it(routed, noise):
    x, p, missing, rows = draw(16, noise)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    found = repaired(weight, summed(x, p if routed else None, missing, rows), Repair(0.3)).double()

    x, r, selection = x.double(), missing.double(), is_selection(rows)
    w = p.double() if routed else torch.ones(len(x), dtype=torch.float64)
    x = x * w[:, None]
    change = ridge_regression(x[~selection], r[~selection], 0.3, float(w[~selection].square().sum()))
    strengths = torch.linspace(0, 1, 1001, dtype=torch.float64)
    left = r[selection] - strengths[:, None, None] * (x[selection] @ change.T)
    best = float(strengths[left.square().sum((1, 2)).argmin()])
    whole = ridge_regression(x, r, 0.3, float(w.square().sum()))
    assert (found - weight - best * whole).abs().max() <= 1e-3 * whole.abs().max() + 1e-4


def test_the_solution_with_a_factor_is_that_of_the_whole_matrix():
    x, _, right, _ = draw(8, 1.0)
    matrix = x.T @ x / len(x) + torch.eye(K)
    exact = torch.linalg.solve(matrix.double(), right[:K].double()).T
    torch.testing.assert_close(solve(factorize(matrix), right[:K].T).double(), exact, rtol=1e-4, atol=1e-5)


def test_a_weight_stays_as_it_is_where_too_few_tokens_can_tell_or_they_speak_against_it():
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    x, _, missing, rows = draw(8, 1.0)
    few = ~is_selection(rows) | (torch.arange(len(rows)) % LENGTH < MIN_SELECTION_TOKENS - 1)
    assert torch.equal(repaired(weight, summed(x[few], None, missing[few], rows[few]), Repair()), weight)
    assert not torch.equal(repaired(weight, summed(x, None, missing, rows), Repair()), weight)
    missing[is_selection(rows)] *= -1
    assert torch.equal(repaired(weight, summed(x, None, missing, rows), Repair()), weight)
    assert torch.equal(repaired(weight, summed(0 * x, None, missing, rows), Repair()), weight)


@pytest.fixture(scope="module", params=["dbrx", "qwen2 moe", "llama tied and biased"])
def job(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    model = StreamedModel(save_model(folder / "model", request.param, std=0.2))
    ids = random_tokens(16, 64)
    measurement = measure(MeasureJob(model, ids, folder / "measure", Progress()))
    groups = {name: option.groups for name, option in allocate(measurement, 3.0, 6).choices.items()}
    return QuantizeJob(model, ids, folder / "quantize", measurement, groups, Progress())


def dense_states(job):
    """The original's states before each block and after the last, as the measurement wrote them."""
    folder = job.folder.parent / "measure"
    count = len(job.model.architecture.blocks)
    return [open_states(folder / f"states-{i:03}.safetensors")[:] for i in range(count + 1)]


def test_the_originals_states_are_those_of_the_measurement(job, monkeypatch):
    seen = []
    run = second_pass._run_original

    def watched(job, index):
        run(job, index)
        seen.append((open_states(job.original(index))[:], open_states(job.middle(index))[:]))

    monkeypatch.setattr(second_pass, "_run_original", watched)
    quantize_model(dataclasses.replace(job, folder=job.folder.with_name("watched")))
    with torch.no_grad():
        for block, (before, middle) in zip(job.model.architecture.blocks, seen, strict=True):
            torch.testing.assert_close(before, dense_states(job)[block.index], rtol=1e-4, atol=1e-5)
            live, inputs = job.model.block(block.index), []
            norm = next(
                m
                for n, m in live.module.named_modules()
                if n.endswith(("norm_2", "post_attention_layernorm"))
            )
            norm.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            live(before)
            assert (middle - inputs[0]).norm() <= 1e-3 * middle.norm()


def test_repaired_weights_keep_the_stream_nearer_to_the_originals(job):
    original = dense_states(job)[-1]
    distances = []
    for repair in (NO_REPAIR, Repair()):
        folder = job.folder.with_name(f"with-{repair != NO_REPAIR}")
        quantize_model(dataclasses.replace(job, folder=folder, repair=repair))
        states = open_states(folder / f"states-{len(job.model.architecture.blocks):03}.safetensors")[:]
        distances.append(float((states - original).square().sum()))
        assert not [p.name for p in folder.glob("*.safetensors") if not p.name.startswith("states")]
    assert distances[1] < 0.9 * distances[0]
