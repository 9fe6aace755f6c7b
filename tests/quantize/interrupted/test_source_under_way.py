"""An original that changes while it is converted, or that leads elsewhere, gives an error and no result."""

import json
import os

import pytest
import torch
from small_models import alter, save_model, save_random_tokens

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.watched import ChangedError
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.model.load_dense import load_dense


@pytest.fixture
def options(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 4, 16, vocabulary=256)
    return ConvertOptions(
        model=model, out=tmp_path / "out", targets=(6.0,), calibration=str(tokens), effort="fast", quiet=True
    )


def doubled(tensors):
    tensors["lm_head.weight"] *= 2


CHANGES = {
    "a shard": lambda folder: alter(folder, doubled),
    "a shard that is cut": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "the config": lambda folder: (folder / "config.json").write_text("{}"),
    "the tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a new file of tokens": lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 290}'),
}


def changing(monkeypatch, step, change, model, calls=1):
    """Have a step of the conversion, at one of its calls, followed by a change of its source."""
    original, left = getattr(conversion, step), [calls]

    def changed(*args, **more):
        result = original(*args, **more)
        left[0] -= 1
        if left[0]:
            return result
        monkeypatch.setattr(conversion, step, original)
        change(model)
        return result

    monkeypatch.setattr(conversion, step, changed)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_file_that_is_read_is_watched(options, change):
    model = StreamedModel(options.model)
    model.check_unchanged()
    change(options.model)
    with pytest.raises(ChangedError, match=r"model/\S+: .* since it was opened"):
        model.check_unchanged()


def test_a_change_after_measuring_is_an_error_and_its_work_is_not_resumed(options, monkeypatch):
    before = {file: file.read_bytes() for file in options.model.iterdir()}
    changing(monkeypatch, "measure", CHANGES["a shard"], options.model)
    with pytest.raises(ChangedError, match=r"model/\S+: .* since it was opened"):
        convert(options)
    assert not options.out.exists()
    for file in options.model.iterdir():
        file.unlink()
    for file, content in before.items():
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"holds work of another conversion: .*since it was opened"):
        convert(options)


def test_a_change_while_the_result_is_written_leaves_one_that_does_not_verify(options, monkeypatch):
    changing(monkeypatch, "write_tokenizer", CHANGES["the config"], options.model, calls=2)
    with pytest.raises(ChangedError, match=r"config\.json: has 2 bytes instead of"):
        convert(options)
    assert not verify(options.out).ok


def test_a_change_while_measuring_alone_is_an_error(options, monkeypatch, tmp_path):
    changing(monkeypatch, "measure", CHANGES["a shard"], options.model)
    with pytest.raises(ChangedError, match=r"model\.safetensors"):
        measure_model(options, tmp_path / "measurement.json")
    assert not (tmp_path / "measurement.json").exists()


def test_tokens_that_change_while_they_are_read_are_an_error(options, monkeypatch):
    changing(monkeypatch, "load_rows", lambda *_: os.truncate(options.calibration, 10), options.model)
    with pytest.raises(ChangedError, match=r"tokens\.safetensors: has 10 bytes"):
        convert(options)


def test_what_the_weights_correct_is_corrected_in_the_result(options, capsys):
    file = options.model / "config.json"
    said = {**json.loads(file.read_text()), "tie_word_embeddings": True, "vocab_size": 256}
    file.write_text(json.dumps(said))
    (result,) = convert(options)
    assert "notice: config.json: tie_word_embeddings is true" in capsys.readouterr().err
    written = json.loads((result.folder / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["vocab_size"]) == (False, 300)
    notes = json.loads((result.folder / "strategy.json").read_text())["notes"]
    assert any("vocab_size is 256, by the weights it is 300" in note for note in notes)
    ids = torch.arange(24).view(1, -1)
    expected, found = (
        model(ids).logits.log_softmax(-1) for model in (load_dense(options.model), load_model(result.folder))
    )
    assert (
        torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean() < 0.05
    )


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"]
)
def test_a_file_that_is_read_is_no_link_out_of_the_folder(options, tmp_path, name):
    file = options.model / name
    (tmp_path / "elsewhere").write_text(file.read_text() if file.exists() else "{}")
    file.unlink(missing_ok=True)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*elsewhere, outside of the folder"):
        convert(options)


def test_shards_may_lie_elsewhere(options, tmp_path):
    shard = options.model / "model.safetensors"
    shard.rename(tmp_path / "disk")
    shard.symlink_to(tmp_path / "disk")
    assert StreamedModel(options.model).embed(torch.tensor([1])).shape == (1, 64)


def test_a_value_that_cannot_be_converted_is_told_before_anything_is_measured(options, monkeypatch):
    monkeypatch.setattr(conversion, "measure", lambda job: pytest.fail("measured"))

    def change(tensors):
        tensors["model.embed_tokens.weight"][299, 5] = float("nan")

    alter(options.model, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.embed_tokens\.weight: .* nan"):
        convert(options)
