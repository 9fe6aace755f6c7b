"""What a conversion leaves about itself: settings, versions and errors, and nothing of time and place."""

import importlib.metadata
import json
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_models import save_model, save_random_tokens

from dbrx_quant.quantize.conversion import convert
from dbrx_quant.quantize.options import ConvertOptions, source_name
from dbrx_quant.quantize.output.record import read_record, write_record
from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.shards.filling import Facts
from dbrx_quant.scripts.cli.main import make_parser


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    model = save_model(folder / "my model", "dbrx")
    tokens = save_random_tokens(folder / "tokens.safetensors", 8, 64)
    out, tokens = folder / "out", str(tokens)
    options = ConvertOptions(model, out, (3.0,), calibration=tokens, seed=7, refit=True, quiet=True)
    return options, convert(options)[0].folder


def test_the_record_holds_the_settings_and_the_versions(converted):
    _, out = converted
    record = read_record(out)
    assert record.settings["bpw"] == 3.0
    assert record.settings["model"] == "my model"
    assert record.settings["calibration"] == "tokens.safetensors"
    assert record.versions["torch"] == importlib.metadata.version("torch")


def test_no_file_of_the_result_tells_where_model_and_calibration_text_were(converted):
    options, out = converted
    where = str(options.out.parent).encode()
    assert [path.name for path in out.iterdir() if where in path.read_bytes()] == []
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["calibration"]["dataset"] == "tokens.safetensors"


def test_its_command_is_one_that_the_parser_takes_to_the_same_settings(converted):
    options, out = converted
    program, *words = shlex.split(read_record(out).command)
    arguments = make_parser().parse_args(words)
    assert program == "dbrx-quant"
    assert (arguments.model, arguments.bpw, arguments.seed) == ("my model", (3.0,), 7)
    assert (arguments.head_bits, arguments.effort) == (options.head_bits, options.effort)
    assert arguments.refit is options.refit is True


def test_every_linear_has_its_error(converted):
    _, out = converted
    errors = read_record(out).relative_errors
    stored = load_file(out / "model.safetensors")
    assert {f"{linear}.q_weight" for linear in errors} == {key for key in stored if key.endswith("q_weight")}
    assert all(0 < error < 0.5 for error in errors.values())


def test_an_error_is_the_loss_over_the_energy_of_the_linear(converted, tmp_path):
    options, _ = converted
    facts = {"a.q": Facts(0.02, 8.0), "b.k": Facts(1 / 3, 1.0), "never.reached": Facts(0.0, 0.0)}
    write_record(tmp_path, options, 3.0, facts)
    assert read_record(tmp_path).relative_errors == {"a.q": 0.0025, "b.k": 0.3333}


def test_a_folder_of_another_converter_has_no_record(tmp_path):
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format_version": 9}',
        '{"format_version": 1, "command": "a", "settings": {}, "versions": {}, "relative_errors": {"x": ""}}',
    ],
)
def test_a_damaged_record_is_named(content, tmp_path):
    (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"conversion\.json"):
        read_record(tmp_path)


def test_a_conversion_replaces_what_was_measured_of_another(converted):
    options, out = converted
    (out / EVALUATION_NAME).write_text(json.dumps({"format_version": 1, "evaluations": []}))
    convert(options)
    assert (out / EVALUATION_NAME).exists()  # the same result, found finished
    next(out.glob("*.safetensors")).unlink()
    convert(options)
    assert not (out / EVALUATION_NAME).exists()


def test_a_source_in_the_hubs_cache_is_named_by_its_repository():
    assert (
        source_name(Path("/c/models--databricks--dbrx-instruct/snapshots/0123abc"))
        == "databricks/dbrx-instruct"
    )
    assert source_name(Path("models/dbrx")) == "dbrx"
