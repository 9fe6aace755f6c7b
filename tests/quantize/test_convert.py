"""From a dense model's folder to EXL2 folders that verify, load and generate."""

import dataclasses
import json

import pytest
import torch
from places import TINY
from safetensors import safe_open
from small_models import CONFIGS, VOCABULARY, random_tokens, save_model, save_random_tokens, whole_model

from dbrx_quant.calibration.text.tokens import load_tokens, split_held_out
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.output.config import Summary, patched_config
from dbrx_quant.runtime.evaluation.scores import evaluate, windows
from dbrx_quant.runtime.exl2.format import dequantize_linear
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import load_linear
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.sizes import linear_bits, stored_bits
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.tokenizer.ids import SpecialIds

TARGETS = (2.5, 3.0, 4.25)


def options(model, out, tokens, *targets, **changes):
    return ConvertOptions(
        **{"model": model, "out": out, "targets": targets, "calibration": str(tokens), "quiet": True}
        | changes
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_random_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", 8, 32, vocabulary=256)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny DBRX at three targets from one measurement, on text of the Python installation."""
    folder = tmp_path_factory.mktemp("tiny")
    results = convert(options(TINY, folder / "out", "offline", *TARGETS, rows=16, length=64))
    return folder, results


def stored(folder):
    architecture = describe(load_config(folder))
    return stored_bits(architecture.open(folder), architecture)


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_several_targets_verify_and_lie_within_a_thousandth_below_them(tiny):
    _, results = tiny
    for target, result in zip(TARGETS, results, strict=True):
        assert result.folder.name == f"{target}bpw"
        report = verify(result.folder)
        assert report.ok, report.faults
        bpw = stored(result.folder).bpw
        assert 0.999 * target <= bpw <= target
        assert result.bpw == pytest.approx(bpw, rel=1e-12)
        assert result.total_bytes == sum(len(data) for data in shards(result.folder).values())


def test_divergence_falls_with_bits_and_was_predicted_to(tiny):
    _, results = tiny
    reference = whole_model(TINY)
    rows = windows(TINY, TINY / "heldout.txt", 4, 128)
    scores = [evaluate(load_model(result.folder), reference, rows) for result in results]
    kl, predicted = [score.kl for score in scores], [result.predicted_kl for result in results]
    assert kl[0] > kl[1] > kl[2] > 0
    assert predicted == sorted(predicted, reverse=True)
    assert kl[2] < 0.1 * scores[0].kl
    assert scores[2].ppl == pytest.approx(scores[2].reference_ppl, rel=0.02)


def test_the_divergence_on_held_out_calibration_rows_is_that_of_the_loaded_result(tiny):
    _, results = tiny
    _, held_out = split_held_out(load_tokens("offline", TINY, 16, 64).input_ids)
    assert len(held_out) == 2
    reference = whole_model(TINY)
    for result in results:
        scores = evaluate(load_model(result.folder), reference, held_out)
        written = json.loads((result.folder / "strategy.json").read_text())["measured"]
        assert (
            result.measured_kl == written["kl"] == pytest.approx(scores.kl, rel=0.1)
        )  # a token at the edge may change experts
        assert written["ppl"] == pytest.approx(scores.ppl, rel=1e-2)
        assert written["reference_ppl"] == pytest.approx(scores.reference_ppl, rel=1e-3)
        assert written["positions"] == 128


def test_a_converted_model_generates(tiny):
    _, results = tiny
    model = load_model(results[1].folder)
    start = torch.tensor([[5, 6, 7]])
    out = model.generate(start, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > 3
    assert out[:, :3].tolist() == start.tolist()


def test_the_output_tells_how_it_was_made(tiny):
    _, results = tiny
    for target, result in zip(TARGETS, results, strict=True):
        config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "exl2"
        assert config["bits"] == target
        strategy = json.loads((result.folder / "strategy.json").read_text())
        assert strategy["target_bpw"] == target
        architecture = describe(load_config(result.folder))
        checkpoint = architecture.open(result.folder)
        for spec in architecture.linears():
            assert strategy["linears"][spec.name]["bits"] == linear_bits(checkpoint, spec), spec.name
        coverage = json.loads((result.folder / "measurement.json").read_text())["coverage"]
        assert set(coverage) == {"0", "1"}
        assert all(sum(row["tokens"] for row in rows) == 14 * 64 * 4 for rows in coverage.values())
    works = {(r.folder / "measurement.json").read_bytes() for r in results}
    assert len(works) == 1, "one measurement serves all targets"


def test_converting_again_finds_everything_done(tiny, capsys):
    folder, results = tiny
    before = {result.folder: shards(result.folder) for result in results}
    stamps = [(result.folder / "model.safetensors").stat().st_mtime_ns for result in results]
    other = {"resume": "must", "max_shard_bytes": 60_000, "quiet": False}
    again = convert(options(TINY, folder / "out", "offline", *TARGETS, rows=16, length=64, **other))
    told = capsys.readouterr().err
    for result in results:
        assert f"{result.folder}: already finished; kept as it is, with the shards it has" in told
    assert [(r.bpw, r.folder) for r in again] == [(r.bpw, r.folder) for r in results]
    assert [(r.folder / "model.safetensors").stat().st_mtime_ns for r in results] == stamps
    assert {result.folder: shards(result.folder) for result in results} == before


def test_a_folder_that_holds_another_result_by_now_is_converted_again(tokens, tmp_path):
    model = save_model(tmp_path / "model", "llama")
    first = None
    for target, head_bits in ((4.0, 6), (3.5, 6), (4.0, 6), (4.0, 3), (4.0, 6)):
        (result,) = convert(options(model, tmp_path / "out", tokens, target, head_bits=head_bits))
        assert result.bpw == pytest.approx(stored(result.folder).bpw, rel=1e-12)
        assert (stored(result.folder).head_bpw < 4) == (head_bits == 3)
        first = first or shards(result.folder)
    assert shards(result.folder) == first


@pytest.mark.parametrize("place", ["model", "model/inner/.."])
def test_a_result_in_the_place_of_its_source_is_refused_before_any_work(place, tokens, tmp_path):
    model = save_model(tmp_path / "model", "llama")
    (model / "inner").mkdir()
    with pytest.raises(ValueError, match="must differ"):
        convert(options(model, tmp_path / place, tokens, 4.0, work_dir=tmp_path / "work"))
    assert not (tmp_path / "work").exists()
    assert "q_weight" not in str(shards(model))


def test_an_earlier_measurement_gives_the_same_bytes_as_measuring_anew(tiny, tmp_path):
    _, results = tiny
    earlier = results[1].folder / "measurement.json"
    (again,) = convert(
        options(TINY, tmp_path / "out", "offline", 3.0, rows=16, length=64, measurement=earlier)
    )
    assert again.folder == tmp_path / "out"
    assert shards(again.folder) == shards(results[1].folder)
    assert not (tmp_path / "out.work" / "measure").exists()


def test_measuring_alone_gives_the_same_measurement(tiny, tmp_path):
    _, results = tiny
    file = measure_model(options(TINY, tmp_path / "out", "offline", rows=16, length=64), tmp_path / "m.json")
    assert file.read_bytes() == (results[0].folder / "measurement.json").read_bytes()


def test_a_measurement_of_another_model_is_refused(tiny, tokens, tmp_path):
    _, results = tiny
    model = save_model(tmp_path / "model", "dbrx")
    with pytest.raises(CheckpointError, match="measured on another model"):
        convert(
            options(model, tmp_path / "out", tokens, 3.0, measurement=results[0].folder / "measurement.json")
        )


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 2, "model": {}, "linears": {}}'])
def test_a_file_that_is_no_measurement_is_refused(text, tokens, tmp_path):
    (tmp_path / "measurement.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"measurement\.json: .*; measure again"):
        convert(options(TINY, tmp_path / "out", tokens, 3.0, measurement=tmp_path / "measurement.json"))


def test_a_missing_measurement_is_refused(tokens, tmp_path):
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"none\.json"):
        convert(options(TINY, tmp_path / "out", tokens, 3.0, measurement=tmp_path / "none.json"))


def test_a_head_of_other_width_leaves_the_decoder_as_it_is(tiny, tmp_path):
    _, results = tiny
    earlier = results[1].folder / "measurement.json"
    (result,) = convert(
        options(TINY, tmp_path / "out", "offline", 3.0, rows=16, length=64, measurement=earlier, head_bits=8)
    )
    wide, usual = stored(result.folder), stored(results[1].folder)
    assert wide.decoder_bits == usual.decoder_bits
    assert 8 < wide.head_bpw < 8.6
    assert 6 < usual.head_bpw < 6.36


# bits of the largest step of the allocation, over the weights of so small a model
ONE_STEP = 0.12


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "dbrx"])
def test_small_models_of_every_family_convert_verify_load_and_generate(family, tokens, tmp_path):
    model = save_model(tmp_path / "model", family)
    (result,) = convert(options(model, tmp_path / "out", tokens, 4.0))
    report = verify(result.folder)
    assert report.ok, report.faults
    bpw = stored(result.folder).bpw
    assert 4.0 - ONE_STEP <= bpw <= 4.0
    assert result.bpw == pytest.approx(bpw, rel=1e-12)
    loaded, ids = load_model(result.folder), random_tokens(2, 16, seed=1)
    with torch.no_grad():
        ours, original = loaded(ids).logits, whole_model(model)(ids).logits
    error = (ours - original).square().mean() / original.var()
    assert error < 0.2
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 2


def all_experts(config):
    """Every expert sees every token: no choice of experts flips."""
    config.ffn_config.moe_top_k = 4


def test_at_eight_bits_the_model_is_nearly_the_original(tokens, tmp_path):
    model = save_model(tmp_path / "model", "dbrx", configure=all_experts)
    (result,) = convert(options(model, tmp_path / "out", tokens, 8.2, head_bits=8))
    ids = random_tokens(2, 16, seed=1)
    with torch.no_grad():
        ours, original = load_model(result.folder)(ids).logits, whole_model(model)(ids).logits
    assert (ours - original).square().mean() < 1e-3 * original.var()


@pytest.mark.parametrize("top", [None, 1000.0])
@pytest.mark.parametrize("parameters", [None, 2000.0])
@pytest.mark.parametrize("nested", [None, 3000.0])
def test_the_output_names_the_rope_base_that_the_original_runs_with(top, parameters, nested, tmp_path):
    """DBRX keeps it in up to three places; transformers 5 adds one with 10000 when it saves a model."""
    if top is parameters is nested is None:
        pytest.skip("refused: no base at all")
    source = json.loads((TINY / "config.json").read_text())
    source["attn_config"] |= {"rope_theta": nested}
    if top is not None:
        source["rope_theta"] = top
    if parameters is not None:
        source["rope_parameters"] = {"rope_type": "default", "rope_theta": parameters}
    nothing = Summary(3.0, 3.0, 6, 0, 0, "", SpecialIds(None, (), None))
    bases = []
    for name, config in (("source", source), ("out", patched_config(source, nothing))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        bases.append(load_config(tmp_path / name).rope_parameters["rope_theta"])
    assert bases[0] == bases[1]
    assert bases[0] in (top, parameters, nested)


def unpopular(expert):
    """Norms and router such that one expert of block 0 is never chosen."""

    def change(tensors):
        router = tensors["transformer.blocks.0.ffn.router.layer.weight"]
        router[expert] = 0
        first, second = (expert + 1) % 4, (expert + 2) % 4
        router[first] = 10 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        router[second] = -router[first]  # of two opposite logits one is above the zero of the expert
        third = (expert + 3) % 4
        router[third] = 10 * torch.randn(64, generator=torch.Generator().manual_seed(1))

    return change


def top_one(config):
    config.ffn_config.moe_top_k = 1


def test_an_expert_that_no_token_reaches_is_converted_all_the_same(tokens, tmp_path):
    model = save_model(tmp_path / "model", "dbrx", change=unpopular(2), configure=top_one)
    (result,) = convert(options(model, tmp_path / "out", tokens, 3.5))
    assert verify(result.folder).ok
    measurement = json.loads((result.folder / "measurement.json").read_text())
    assert measurement["coverage"]["0"][2]["tokens"] == 0
    for part in ("w1", "v1", "w2"):
        entry = measurement["linears"][f"model.layers.0.block_sparse_moe.experts.2.{part}"]
        assert entry["tokens"] == 0
        assert all(option[1] > 0 for option in entry["options"]), "its error still has a price"
    architecture = describe(load_config(model))
    dense, quantized = architecture.open(model), architecture.open(result.folder)
    for spec in architecture.blocks[0].experts.linears[2]:
        weight = load_linear(dense, spec).float()
        error = dequantize_linear(quantized.linear(spec.name)).float() - weight
        assert error.square().mean() < 0.5 * weight.square().mean(), spec.name


def test_an_unknown_architecture_is_refused_before_any_work(tokens, tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"})
    )
    with pytest.raises(CheckpointError, match=r"GemmaForCausalLM.*supported"):
        convert(options(folder, tmp_path / "out", tokens, 3.0))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("verb", [convert, lambda chosen: measure_model(chosen, chosen.out / "m.json")])
def test_channels_that_cannot_be_quantized_are_refused_before_any_work(verb, tokens, tmp_path):
    def odd(config):
        config.intermediate_size = 80

    folder = save_model(tmp_path / "model", "llama", configure=odd)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj: 80 input .* not a multiple of 32"):
        verb(options(folder, tmp_path / "out", tokens, 3.0))
    assert not (tmp_path / "out.work").exists()


def test_a_quantized_model_is_refused_as_source(tiny, tokens, tmp_path):
    _, results = tiny
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(options(results[0].folder, tmp_path / "out", tokens, 3.0))


@pytest.mark.parametrize("target", [2.0, 2.2, 8.45])
def test_a_target_out_of_reach_is_refused_with_the_floor(target, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"out of reach.*2\.2374.*8\.3"):
        convert(options(TINY, tmp_path / "out", tokens, 3.0, target))
    assert not (tmp_path / "out").exists()


def test_no_target_and_no_device_are_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match="no target"):
        convert(options(TINY, tmp_path / "out", tokens))
    with pytest.raises(ValueError, match="device"):
        convert(options(TINY, tmp_path / "out", tokens, 3.0, device="toaster"))


def test_changed_arguments_are_refused_naming_them(tiny, tmp_path):
    folder, _ = tiny
    chosen = options(TINY, folder / "out", "offline", *TARGETS, rows=16, length=64)
    for change, told in (({"seed": 7}, "seed was 0, now 7"), ({"rows": 8}, "rows was 16, now 8")):
        with pytest.raises(ValueError, match=told):
            convert(dataclasses.replace(chosen, **change))


def test_another_number_of_threads_is_refused(tiny, tmp_path):
    folder, _ = tiny
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        told = rf"threads \(OMP_NUM_THREADS\) was {before}, now {before + 1}"
        with pytest.raises(ValueError, match=told):
            convert(options(TINY, folder / "out", "offline", *TARGETS, rows=16, length=64))
    finally:
        torch.set_num_threads(before)


def test_a_changed_source_is_refused_naming_the_file(tokens, tmp_path):
    model = save_model(tmp_path / "model", "llama")
    convert(options(model, tmp_path / "out", tokens, 4.0))
    save_model(tmp_path / "model", "llama", seed=1)
    with pytest.raises(ValueError, match=r"model\.model\.safetensors was '.*', now '"):
        convert(options(model, tmp_path / "out", tokens, 4.0))


def test_small_shards_are_joined_by_an_index(tokens, tmp_path):
    model = save_model(tmp_path / "model", "mixtral")
    (result,) = convert(options(model, tmp_path / "out", tokens, 4.0, max_shard_bytes=60_000))
    files = sorted(result.folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size <= 60_000 for file in files)
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert all(index[name] == file.name for name in opened.keys())  # noqa: SIM118
    assert verify(result.folder).ok


def test_the_vocabulary_holds_the_tokens():
    assert VOCABULARY > 256
