"""Errors on held-out rows: measured beside the calibration, which they do not touch, and told of a result."""

import dataclasses
import json

import pytest
import torch
from places import TINY
from small_models import random_tokens, save_model, whole_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.text.tokens import load_tokens
from dbrx_quant.quantize import first_pass
from dbrx_quant.quantize.budget import measure as measuring
from dbrx_quant.quantize.budget.curve import held_out_ratio
from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.output.record import read_record
from dbrx_quant.quantize.solve.prepare import prepare
from dbrx_quant.runtime.evaluation.scores import evaluate
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.output.progress import Progress
from dbrx_quant.scripts.cli.main import main


def inputs(seed, tokens=300, channels=64):
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def collected(*parts):
    result = HeldOutInputs()
    for x, weights in parts:
        result.add(x, weights)
    return result


def test_an_error_is_the_weighted_mean_over_all_tokens():
    first, second, weights = inputs(0, 20, 8), inputs(1, 30, 8), inputs(2, 30, 1)[:, 0].square()
    error = inputs(3, 8, 5)
    found = collected((first, None), (second, weights)).error(error)
    outputs = torch.cat([first, second]).double() @ error.double()
    everyone = torch.cat([torch.ones(20), weights]).double()
    assert found == pytest.approx(float((everyone * outputs.square().sum(1)).sum() / everyone.sum()))


def test_the_ratio_is_one_on_the_hessians_own_tokens_and_grows_with_the_square_of_the_inputs():
    x, weight = inputs(0), inputs(1, 40)
    prepared = prepare(x.T @ x / len(x))
    assert held_out_ratio(weight, prepared, collected((x, None))) == pytest.approx(1, rel=1e-3)
    assert held_out_ratio(weight, prepared, collected((3 * x, None))) == pytest.approx(9, rel=1e-3)
    assert held_out_ratio(weight, prepared, HeldOutInputs()) == 1.0
    assert held_out_ratio(torch.zeros_like(weight), prepared, collected((x, None))) == 1.0


def test_text_of_another_kind_costs_more():
    calm, weight = inputs(0) * torch.linspace(0.1, 1, 64), inputs(1, 40)
    prepared = prepare(calm.T @ calm / len(calm))
    other = inputs(2) * torch.linspace(1, 0.1, 64)
    same = inputs(3) * torch.linspace(0.1, 1, 64)
    assert held_out_ratio(weight, prepared, collected((other, None))) > 2
    assert 0.9 < held_out_ratio(weight, prepared, collected((same, None))) < 1.8


@pytest.mark.parametrize("family", ["dbrx", "qwen3 moe", "llama tied and biased"])
def test_held_out_rows_are_followed_like_others_and_change_nothing_else(family, tmp_path, monkeypatch):
    """The inputs that are kept have the power that measuring those rows by themselves sums up."""
    model = StreamedModel(save_model(tmp_path / "model", family, std=0.2))
    ids, held_out = random_tokens(8, 12), random_tokens(3, 12, seed=9)
    plain = measure(MeasureJob(model, ids, tmp_path / "plain", Progress()))

    kept, summed, ratio, hessian = [], [], measuring.held_out_ratio, measuring.hessian

    def note_kept(weight, prepared, inputs):
        kept.append((inputs.tokens, inputs.error(torch.eye(weight.shape[1])) if inputs.tokens else 0.0))
        return ratio(weight, prepared, inputs)

    def note_summed(moments, prior, shrinkage):
        summed.append((moments.tokens, float(moments.matrix.trace()) / (moments.weight or 1.0)))
        return hessian(moments, prior, shrinkage)

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "held_out_ratio", note_kept)
        both = measure(MeasureJob(model, ids, tmp_path / "both", Progress(), held_out=held_out))
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "hessian", note_summed)
        measure(MeasureJob(model, held_out, tmp_path / "alone", Progress()))
    assert [tokens for tokens, _ in kept] == [tokens for tokens, _ in summed]
    assert [power for _, power in kept] == pytest.approx([power for _, power in summed], rel=1e-4)

    ratios = {name: linear.held_out_ratio for name, linear in both.linears.items()}
    assert all(value > 0 for value in ratios.values())
    assert len(set(ratios.values())) > 1
    assert {linear.held_out_ratio for linear in plain.linears.values()} == {1.0}
    same = {name: dataclasses.replace(linear, held_out_ratio=1.0) for name, linear in both.linears.items()}
    assert dataclasses.replace(both, linears=same) == plain


def test_no_more_tokens_are_kept_than_the_memory_is_planned_for(tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "HELD_OUT_TOKENS", 30)
    model = StreamedModel(save_model(tmp_path / "model", "dbrx", std=0.2))
    ids, held_out = random_tokens(4, 12), random_tokens(7, 12, seed=9)
    rows = MeasureJob(model, ids, tmp_path, Progress(), held_out=held_out).rows
    assert rows.tolist() == torch.cat([ids, held_out[[0, 6]]]).tolist()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny DBRX with held-out text of its own kind, all calibration rows calibrated on."""
    folder = tmp_path_factory.mktemp("held-out")
    return convert(options(folder / "out")), options(folder / "out")


def options(out, **changes):
    given = {"held_out": str(TINY / "heldout.txt"), "held_out_rows": 3} | changes
    return ConvertOptions(TINY, out, (3.0,), calibration="offline", rows=16, length=64, quiet=True, **given)


def test_held_out_text_is_what_a_result_is_measured_on(converted):
    (result,), given = converted
    rows = load_tokens(given.held_out, TINY, 3, 64).input_ids
    scores = evaluate(load_model(result.folder), whole_model(TINY), rows)
    assert result.measured_kl == pytest.approx(scores.kl, rel=0.1)  # a token at the edge may change experts
    strategy = json.loads((result.folder / "strategy.json").read_text())
    assert strategy["held_out"] == "heldout.txt"
    assert strategy["measured"]["positions"] == 3 * 64
    measurement = json.loads((result.folder / "measurement.json").read_text())
    assert measurement["held_out"] == "heldout.txt"
    assert measurement["tokens"] == 16 * 64, "nothing of the calibration is kept out"


def test_held_out_text_is_part_of_the_record(converted):
    (result,), _ = converted
    record = read_record(result.folder)
    assert record.settings["held_out"] == "heldout.txt"
    assert "--held-out heldout.txt --held-out-rows 3" in record.command


def test_a_report_of_a_fresh_result_names_the_text_that_it_was_measured_on(converted, tmp_path):
    (result,), _ = converted
    page = tmp_path / "report.html"
    assert main(["report", str(result.folder), "-o", str(page)]) == 0
    assert "on heldout.txt" in page.read_text(encoding="utf-8")


def test_rows_of_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 held-out rows asked for, but no text; give --held-out"):
        options(tmp_path / "out", held_out=None)


@pytest.mark.parametrize("change", [{"held_out": None, "held_out_rows": None}, {"held_out_rows": 2}])
def test_work_with_other_held_out_text_is_not_gone_on_with(converted, change):
    _, given = converted
    with pytest.raises(ValueError, match="held_out"):
        convert(options(given.out, **change))


def test_too_little_held_out_text_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(
        ValueError, match=r"heldout\.txt: 9999 rows of 64 tokens asked for, but the text gives"
    ):
        convert(options(tmp_path / "out", held_out_rows=9999))
