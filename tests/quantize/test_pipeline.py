"""Every linear is solved on what the quantized linears before it produce, and is a file when it is done."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import expert_output, random_tokens, save_model
from transformers.activations import ACT2FN

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.routing import tokens_of
from dbrx_quant.calibration.blocks.states import open_states
from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.calibration.statistics.shrinkage import hessian
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.second_pass import QuantizeJob, quantize_model
from dbrx_quant.quantize.solve import linear
from dbrx_quant.quantize.solve.linear import solve_linear
from dbrx_quant.quantize.solve.prepare import prepare
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, NO_REPAIR
from dbrx_quant.runtime.exl2.format import dequantize_linear, uniform_groups, unpack_linear
from dbrx_quant.runtime.exl2.group_text import parse_groups
from dbrx_quant.runtime.families.facts import load_bias
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.output.progress import Progress
from oracles_solver import damped, strong_hessian, weights


def make_job(folder, work, ids, target=3.5):
    model = StreamedModel(folder)
    measurement = measure(MeasureJob(model, ids, work / "measure", Progress()))
    groups = {name: option.groups for name, option in allocate(measurement, target, 6).choices.items()}
    return QuantizeJob(model, ids, work / "quantize", measurement, groups, Progress())


@pytest.fixture(scope="module", params=["dbrx", "qwen2 moe", "qwen3 moe", "llama tied and biased", "qwen2"])
def finished(request, tmp_path_factory):
    """A finished quantization; low bits, so that it matters which weights come before."""
    folder = tmp_path_factory.mktemp("pipeline")
    job = make_job(save_model(folder / "model", request.param, std=0.2), folder, random_tokens(8, 12))
    quantize_model(job)
    return job


def stored(job, spec):
    return {name.rpartition(".")[2]: t for name, t in load_file(job.linears.path(spec.name)).items()}


def test_the_states_after_the_last_block_are_those_of_the_quantized_model(finished):
    model = finished.model
    with torch.no_grad():
        states = model.embed(finished.tokens)
        for block in model.architecture.blocks:
            live = model.block(block.index)
            live.install({s.name: finished.linears.weight(s) for stage in block.stages for s in stage})
            states, routing = live(states)
            for expert, specs in enumerate(block.experts.linears if block.experts else ()):
                mine = tokens_of(routing, expert)
                three = tuple(finished.linears.weight(spec) for spec in specs)
                y = expert_output(routing.x[mine.index], three, ACT2FN[block.experts.activation])
                states.view(-1, states.shape[-1])[mine.index] += mine.weight[:, None] * y
    written = open_states(finished.states(len(model.architecture.blocks)))[:]
    errors = ((written - states).norm(dim=-1) / states.norm(dim=-1)).flatten().sort().values
    assert errors[-2] <= 4e-3, "16 bits between blocks"
    assert errors[-1] <= 1, "which may send a token to another expert"


def test_every_linear_has_the_groups_of_the_strategy_and_its_bias(finished):
    for spec in finished.model.architecture.linears():
        tensors = stored(finished, spec)
        assert unpack_linear(tensors).groups == parse_groups(finished.groups[spec.name]), spec.name
        bias = load_bias(finished.model.checkpoint, spec)
        assert ("bias" in tensors) == (bias is not None)
        if bias is not None:
            assert torch.equal(tensors["bias"][: spec.shape[1]], bias.half())
            assert (tensors["bias"][spec.shape[1] :] == 0).all()


def test_a_finished_weight_is_what_its_file_decodes_to(finished):
    for spec in finished.model.architecture.linears():
        exact = dequantize_linear(stored(finished, spec))[: spec.shape[1]].float()
        assert torch.equal(finished.linears.weight(spec), exact), spec.name


def test_states_before_finished_blocks_are_gone(finished):
    last = len(finished.model.architecture.blocks)
    assert [path.name for path in finished.folder.glob("*.safetensors")] == [f"states-{last:03}.safetensors"]


def test_the_loss_in_a_file_is_that_of_its_inputs(finished):
    """For the first block's query: tr(E^T H E), with H made of the block's own normed inputs."""
    spec = finished.model.architecture.blocks[0].stages[0][0]
    live, moments = finished.model.block(0), Moments.zero(spec.shape[0])
    hook = live.submodule(spec).register_forward_pre_hook(
        lambda _, x: moments.add(x[0].reshape(-1, x[0].shape[-1]))
    )
    with torch.no_grad():
        live(finished.model.embed(finished.tokens))
    hook.remove()
    matrix = hessian(moments, None, finished.measurement.linears[spec.name].shrinkage).double()
    weight = finished.model.dense(spec).double()
    error = weight - finished.linears.weight(spec).double()
    with safe_open(finished.linears.path(spec.name), "pt") as opened:
        loss, energy = (float(opened.metadata()[key]) for key in ("loss", "energy"))
    assert energy == pytest.approx(float(((weight @ matrix) * weight).sum()), rel=1e-3)
    assert loss == pytest.approx(float(((error @ matrix) * error).sum()), rel=1e-3)


def test_finished_linears_are_not_solved_again(finished, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("done before")

    monkeypatch.setattr(linear, "solve_linear", unwanted)
    monkeypatch.setattr(StreamedModel, "block", unwanted)
    seen = []

    class Steps(Progress):
        def step(self, what):
            seen.append(what)

    quantize_model(dataclasses.replace(finished, progress=Steps()))
    assert seen == [spec.name for spec in finished.model.architecture.linears()]


@pytest.mark.parametrize("family", ["dbrx", "llama tied and biased"])
@pytest.mark.parametrize("repair", [NO_REPAIR, DEFAULT_REPAIR])
def test_held_out_rows_are_measured_and_change_nothing(family, repair, tmp_path):
    job = make_job(save_model(tmp_path / "model", family, std=0.2), tmp_path, random_tokens(16, 24))
    held_out, found, files = random_tokens(3, 24, seed=7), [], []
    for name, ids in (("one", held_out), ("other", held_out.flip(1))):
        one = dataclasses.replace(job, folder=tmp_path / name, held_out=ids, repair=repair)
        found.append(quantize_model(one))
        assert quantize_model(one) == found[-1]
        files.append({path.name: path.read_bytes() for path in (one.folder / "linears").iterdir()})
        assert not list(one.folder.glob("original*")) + list(one.folder.glob("middle*"))
    assert files[0] == files[1]
    assert found[0]["kl"] > 0.01
    assert found[0]["kl"] != found[1]["kl"]
    assert found[0]["positions"] == 72


@pytest.mark.parametrize("n", [32, 40, 7])
def test_a_solved_linear_decodes_near_its_weight_and_is_padded_to_32_columns(n):
    generator = torch.Generator().manual_seed(n)
    matrix = damped(strong_hessian(96, 800, generator), 0.01)
    weight = weights(96, n, generator).T.contiguous()
    tensors, loss = solve_linear(weight, prepare(matrix.clone()), uniform_groups(96, 4, 32))
    decoded = dequantize_linear(tensors).float()
    assert decoded.shape == (-(-n // 32) * 32, 96)
    assert (decoded[n:] == 0).all()
    error = (weight - decoded[:n]).double()
    assert loss == pytest.approx(float(((error @ matrix.double()) * error).sum()), rel=1e-3)
    assert error.square().mean() < 0.05 * weight.square().mean()


def test_a_bias_beyond_half_precision_is_refused_by_name(tmp_path):
    def damage(tensors):
        tensors["model.layers.0.self_attn.k_proj.bias"][5] = 1e5

    job = make_job(save_model(tmp_path / "model", "qwen2", change=damage), tmp_path, random_tokens(4, 8))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.bias: .*100000.* float16"):
        quantize_model(job)
