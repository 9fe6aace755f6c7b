"""Folders without a fitting index, as exllamav2 leaves them, load through transformers, or it says how."""

import json

import pytest
import torch
from cli_runs import run
from quant_models import CONFIGS, build_quantized_folder
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.verify import verify

PROMPT = torch.arange(20)[None] * 7 % 128
STALE = {"weight_map": {"lm_head.weight": "model-00001-of-00061.safetensors"}}


def same_logits(folder, dtype=torch.float32):
    models = [load(folder, dtype=dtype) for load in (AutoModelForCausalLM.from_pretrained, load_model)]
    with torch.no_grad():
        return torch.equal(*(model(PROMPT).logits for model in models))


def in_two_shards(made):
    """The folder with its tensors in two files as exllamav2 names them."""
    (made.path / "model.safetensors").unlink()
    names = sorted(made.tensors)
    for i in (0, 1):
        part = {name: made.tensors[name] for name in names[i::2]}
        save_tensors(made.path / f"output-0000{i + 1}-of-00002.safetensors", part, {"format": "pt"})
    return made.path


@pytest.fixture
def made(tmp_path):
    return build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "dbrx")


def test_a_checkpoint_of_exllamav2_loads_through_transformers(shared):
    assert same_logits(shared / "golden" / "tiny-dbrx-exl2-3.0bpw")


@pytest.mark.parametrize("stale", [False, True])
def test_one_shard_of_any_name_loads_through_transformers(made, tmp_path, stale):
    made.write("output.safetensors")
    if stale:
        (made.path / INDEX_NAME).write_text(json.dumps(STALE))
    assert same_logits(made.path)
    AutoModelForCausalLM.from_pretrained(made.path).save_pretrained(tmp_path / "saved")
    assert "transformers_weights" not in (tmp_path / "saved" / "config.json").read_text()
    assert same_logits(tmp_path / "saved")


@pytest.mark.parametrize("stale", [False, True])
def test_several_shards_that_no_index_names_are_refused_with_the_command_that_mends_it(made, stale, capsys):
    folder = in_two_shards(made)
    if stale:
        (folder / INDEX_NAME).write_text(json.dumps(STALE))
    with pytest.raises(
        CheckpointError, match=f"names the 2 shards; write it with `dbrx-quant index {folder}`"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    load_model(folder)
    assert any(f"{INDEX_NAME}: " in line and "dbrx-quant index" in line for line in verify(folder).warnings)
    code, out, _ = run(capsys, "index", folder, "--json")
    assert (code, json.loads(out)["shards"], json.loads(out)["tensors"]) == (0, 2, len(made.tensors))
    assert same_logits(folder)
    assert not any(INDEX_NAME in line for line in verify(folder).warnings)


def test_the_index_is_that_of_transformers(made, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(made.path).save_pretrained(tmp_path / "s", max_shard_size="50KB")
    path = tmp_path / "s" / INDEX_NAME
    expected = json.loads(path.read_text())
    for text in (None, "[]", json.dumps({**expected, "weight_map": {}})):
        path.unlink() if text is None else path.write_text(text)
        code, out, _ = run(capsys, "index", tmp_path / "s")
        assert code == 0
        assert f"{len(expected['weight_map'])} tensors in" in out
        found = json.loads(path.read_text())
        assert found["weight_map"] == expected["weight_map"]
        assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]


def test_no_index_is_written_for_an_incomplete_folder(made, capsys):
    folder = in_two_shards(made)
    (folder / "output-00002-of-00002.safetensors").unlink()
    code, _, error = run(capsys, "index", folder)
    assert code == 1
    assert "missing; config.json requires it" in error
    assert not (folder / INDEX_NAME).exists()
