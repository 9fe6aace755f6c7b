"""The predicted divergence is that of the original with noise as strong as the options' errors."""

import dataclasses

import pytest
import torch
from small_models import random_tokens, save_model, whole_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.budget.predict import Predictor, over_noise
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.runtime.output.progress import Progress


@pytest.fixture(scope="module", params=["dbrx", "qwen3 moe", "llama tied and biased"])
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    model = StreamedModel(save_model(folder / "model", request.param, std=0.1))
    ids = random_tokens(16, 24)
    return model, measure(MeasureJob(model, ids, folder / "measure", Progress())), ids


def strategy_of(measurement, target=4.0, errors=lambda name, error: error):
    found = allocate(measurement, target, 6)
    choices = {n: dataclasses.replace(o, error=errors(n, o.error)) for n, o in found.choices.items()}
    return dataclasses.replace(found, choices=choices, kl=sum(c.error for c in choices.values()))


def test_without_errors_nothing_diverges(measured, tmp_path):
    model, measurement, ids = measured
    exact = strategy_of(measurement, errors=lambda name, error: 0.0)
    assert Predictor(model, measurement, ids[:2], tmp_path).kl(exact, False)[0] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("which", ["layers.1.self_attn.k_proj", "layers.0.self_attn.o_proj", "lm_head"])
def test_the_noise_of_one_linear_is_as_strong_as_its_error(measured, which, tmp_path):
    """The same noise put into the whole model by hand gives the same divergence."""
    model, measurement, ids = measured
    strategy = strategy_of(measurement, errors=lambda name, error: error if which in name else 0.0)
    (spec,) = [s for s in model.architecture.linears() if which in s.name]
    found = Predictor(model, measurement, ids[:2], tmp_path, seed=3).kl(strategy, False)[0]
    found /= over_noise(strategy.bpw, False)

    variance = strategy.choices[spec.name].error / measurement.linears[spec.name].price / spec.shape[1]
    generator = torch.Generator().manual_seed(3)
    begin, end = spec.outputs or (0, spec.shape[1])
    whole = whole_model(model.folder)

    def disturb(module, inputs, output):
        noise = torch.zeros_like(output)
        rows = output.split(1) if which == "lm_head" else [output]
        drawn = [torch.randn(*row.shape[:-1], end - begin, generator=generator) for row in rows]
        noise[..., begin:end] = variance**0.5 * torch.cat(drawn)
        return output + noise

    with torch.no_grad():
        original = whole(ids[:2]).logits.log_softmax(-1)
        whole.get_submodule(spec.module).register_forward_hook(disturb)
        other = whole(ids[:2]).logits.log_softmax(-1)
    expected = float((original.exp() * (original - other)).sum(-1).mean())
    assert expected > 0
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-8)


def test_noise_is_as_strong_as_errors_are_on_held_out_tokens(measured, tmp_path):
    model, measurement, ids = measured
    stronger = {
        name: dataclasses.replace(one, held_out_ratio=4.0) for name, one in measurement.linears.items()
    }
    harder = dataclasses.replace(measurement, linears=stronger)
    held_out = Predictor(model, harder, ids[:2], tmp_path / "held_out")
    plain = Predictor(model, measurement, ids[:2], tmp_path / "plain")
    larger = strategy_of(measurement, errors=lambda name, error: 4 * error)
    assert held_out.kl(strategy_of(measurement), False) == pytest.approx(plain.kl(larger, False), rel=1e-4)


def test_small_errors_cost_what_the_measurement_says_to_second_order(measured, tmp_path):
    """In the last block, after which no token can change its experts."""
    model, measurement, ids = measured
    parts = ("layers.1.mlp", "layers.1.block_sparse_moe", "lm_head")
    strategy = strategy_of(
        measurement, errors=lambda name, error: 1e-2 * error if any(p in name for p in parts) else 0.0
    )
    found, _ = Predictor(model, measurement, ids, tmp_path).kl(strategy, False)
    assert 0.7 < found / over_noise(strategy.bpw, False) / strategy.kl < 1.4


def test_the_same_seed_gives_the_same_prediction_and_a_repair_lowers_it(measured, tmp_path):
    model, measurement, ids = measured
    strategy, predictor = strategy_of(measurement), Predictor(model, measurement, ids[:2], tmp_path / "a")
    first = predictor.kl(strategy, False)
    assert first == predictor.kl(strategy, False)
    assert first == Predictor(model, measurement, ids[:2], tmp_path / "b").kl(strategy, False)
    assert Predictor(model, measurement, ids[:1], tmp_path / "c").kl(strategy, True)[1] is None
    for bpw, repaired, factor in (
        (2.2, True, 0.91),
        (2.75, True, 0.97),
        (8.0, True, 1.16),
        (8.0, False, 1.22),
    ):
        found = predictor.kl(dataclasses.replace(strategy, bpw=bpw), repaired)
        assert found == pytest.approx([value * factor / over_noise(strategy.bpw, False) for value in first])
