"""The files beside the shards must speak of these shards and of one conversion."""

import json
import shutil

import pytest
from small_models import save_model, save_random_tokens

from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.evaluation.record import save_evaluation
from dbrx_quant.runtime.folder.verify import verify


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two conversions of a model that have nothing in common but the model."""
    folder = tmp_path_factory.mktemp("results")
    model = save_model(folder / "model", "llama")
    tokens = save_random_tokens(folder / "tokens.safetensors", 4, 16)
    made = []
    for bits, head_bits in ((4.0, 6), (5.0, 4)):
        options = ConvertOptions(
            model=model,
            out=folder / f"{bits}",
            targets=(bits,),
            head_bits=head_bits,
            calibration=str(tokens),
            quiet=True,
        )
        (result,) = convert(options)
        figures = {
            "ppl": 2.0,
            "ppl_original": 2.0,
            "kl": 0.1,
            "kl_stderr": None,
            "top1": 1.0,
            "router_topk": None,
        }
        where = {"text": "a.txt", "windows": 1, "length": 8, "tokens": 8, "bpw": result.bpw}
        save_evaluation(result.folder, figures | where)
        made.append(result.folder)
    return made


def test_one_conversion_agrees_with_itself(results):
    for folder in results:
        report = verify(folder)
        assert report.ok, report.faults


OTHERS = {
    "strategy.json": (
        "bits per weight asked for: config.json says 4.0, strategy.json says 5.0",
        "strategy.json: bits",
    ),
    "conversion.json": (
        "conversion.json says 5.0: they are of different",
        "bits of the head: config.json says 6",
    ),
    "evaluation.json": ("evaluation.json: evaluations[0]: bpw is", "the shards hold"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_conversion_is_a_fault(name, results, tmp_path):
    ours, other = results
    shutil.copytree(ours, tmp_path / "mixed")
    shutil.copyfile(other / name, tmp_path / "mixed" / name)
    faults = verify(tmp_path / "mixed").faults
    for text in OTHERS[name]:
        assert any(text in fault for fault in faults), faults
    assert len(faults) < 10


def test_shards_of_another_conversion_are_a_fault(results, tmp_path):
    ours, other = results
    shutil.copytree(ours, tmp_path / "mixed")
    for name in ("model.safetensors", "checksums.json", "config.json"):
        shutil.copyfile(other / name, tmp_path / "mixed" / name)
    faults = " ".join(verify(tmp_path / "mixed").faults)
    assert "config.json says 5.0, strategy.json says 4.0, conversion.json says 4.0" in faults
    assert "linears in all is not that of the model" in faults


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("measurement.json", lambda c: c["linears"].pop("lm_head"), "shape of lm_head is missing"),
        (
            "measurement.json",
            lambda c: c["linears"]["lm_head"].update(shape=[1, 2]),
            "shape of lm_head is [1, 2]",
        ),
        ("strategy.json", lambda c: c["linears"].update(x={"bits": 3}), "bits of x is 3, the model has none"),
        ("strategy.json", lambda c: c.update(bpw=3.0), "strategy.json: bpw is 3.0, the shards hold"),
        ("conversion.json", lambda c: c["relative_errors"].update(x=0.1), "x is no linear of this model"),
        (
            "config.json",
            lambda c: c["quantization_config"].update(bits=[4.0]),
            "config.json says [4.0], strategy",
        ),
        (
            "config.json",
            lambda c: c["quantization_config"].update(head_bits=8),
            "bits of the head: config.json",
        ),
    ],
)
def test_every_figure_that_two_files_have_is_compared(name, change, told, results, tmp_path):
    shutil.copytree(results[0], tmp_path / "out")
    changed(tmp_path / "out" / name, change)
    faults = verify(tmp_path / "out").faults
    assert any(told in fault for fault in faults), faults
