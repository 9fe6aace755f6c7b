"""SECURITY.md keeps its word: no code that a checkpoint brings or names is run."""

import io
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from places import TINY

from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.model.load_dense import load_dense
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

CLASSES = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
(Path({folder!r}) / "ran").touch()
class Config(PretrainedConfig):
    model_type = "own"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path):
    """The small DBRX, with Python code that leaves a trace where it is run."""
    made = tmp_path / "model"
    shutil.copytree(TINY, made)
    (made / "own.py").write_text(CLASSES.format(folder=str(tmp_path)), encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def somebody_who_agrees_to_everything(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))


def change(file, **keys):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | keys), encoding="utf-8")


def test_a_model_type_of_its_own_is_refused_without_a_question(folder, capsys):
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(folder)
    assert not (folder.parent / "ran").exists()
    assert "[y/N]" not in capsys.readouterr().out


def test_the_class_of_a_known_model_is_transformers_own(folder):
    change(folder / "config.json", auto_map={"AutoConfig": "own.Config"})
    assert load_config(folder).model_type == "dbrx"
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    assert load_tokenizer(folder)("def")["input_ids"]
    (folder / "tokenizer.json").unlink()
    with suppress(CheckpointError):  # whether transformers makes one of the other files is its affair
        load_tokenizer(folder)
    assert not (folder.parent / "ran").exists()


def test_a_config_names_no_attention_kernel(folder):
    change(folder / "config.json", _attn_implementation="somebody/kernel", attn_implementation="a/b")
    assert load_config(folder)._attn_implementation is None


def test_pickled_weights_are_not_opened_where_there_are_others(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    load_dense(folder)


class Runs:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_code_in_pickled_weights_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    hostile = {"transformer.wte.weight": torch.zeros(1), "x": Runs(folder.parent / "ran")}
    torch.save(hostile, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not readable as tensors alone"):
        load_dense(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(hostile["x"]))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not readable as tensors alone"):
        load_dense(folder)
    assert not (folder.parent / "ran").exists()


def test_pickled_weights_of_a_quantized_model_are_not_opened(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files"):
        load_model(folder)
