"""Shards are read lazily and every way a file can be broken has its own clear refusal."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.files.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    save_file(
        {"a": torch.arange(3, dtype=torch.float16), "b": torch.arange(6).view(2, 3)},
        tmp_path / "1.safetensors",
    )
    save_file(
        {"c": torch.ones(2, 2, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}, tmp_path / "2.safetensors"
    )
    return tmp_path


def test_tensors_of_all_shards_are_read_by_name(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == ["a", "b", "c", "empty"]
    assert torch.equal(checkpoint.load("b", (1, 2)), torch.tensor([[3, 4, 5]]))
    assert checkpoint.load("c").dtype == torch.bfloat16
    assert checkpoint.load("empty").shape == (0, 4)
    assert checkpoint.info("a").nbytes == 6


def test_loading_maps_the_file_instead_of_copying(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.load("a")[0] = 7
    assert checkpoint.load("a")[0] == 7, "two loads are views of one mapping"
    assert Checkpoint(folder).load("a")[0] == 0, "and writing does not reach the disk"


def test_released_tensors_read_the_same(folder):
    checkpoint = Checkpoint(folder)
    tensor = checkpoint.load("b")
    before = tensor.clone()
    checkpoint.release("b")
    assert torch.equal(tensor, before)


def test_names_are_normalised(folder):
    assert "model.a" in Checkpoint(folder, lambda name: f"model.{name}")


def test_an_index_of_absent_shards_is_stale_and_ignored(folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"zzz": "model-00001-of-00061.safetensors"}}))
    assert "a" in Checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "x": "1.safetensors"}, "names the tensor x in 1.safetensors, which does not"),
        ({"a": "1.safetensors", "c": "3.safetensors"}, "names the shard 3.safetensors, which isn't there"),
        ({"a": "2.safetensors"}, "names the tensor a in 2.safetensors, which does not hold it"),
        (
            {"a": "2.safetensors", "b": "1.safetensors"},
            "places a in 2.safetensors, but it is in 1.safetensors",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(folder, weight_map, message):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder, source=True)


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(dtype="F8_E4M3"), "b: dtype F8_E4M3"),
        (lambda h: h["b"].update(shape=[2, 4]), "b: 48 bytes, its shape .* requires 64"),
        (lambda h: h["a"].update(data_offsets=[0, 48]), "a: 48 bytes"),
        (lambda h: h["a"].update(data_offsets=[2, 8]), "data starts at"),
        (lambda h: h["b"].pop("shape"), "not a valid safetensors header"),
        (lambda h: h.update(b=3), "not a valid safetensors header"),
    ],
)
def test_a_malformed_header_is_refused(folder, change, message):
    rewrite_header(folder / "1.safetensors", change)
    with pytest.raises(CheckpointError, match=rf"1\.safetensors: .*{message}"):
        Checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_file_cut_short_is_refused(folder, keep):
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"1\.safetensors: "):
        Checkpoint(folder)


def test_a_git_lfs_pointer_is_named_as_such(folder):
    (folder / "1.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint(folder)


def test_a_name_stored_twice_is_refused(folder):
    save_file({"a": torch.zeros(1)}, folder / "3.safetensors")
    with pytest.raises(CheckpointError, match=r"3\.safetensors: a: already stored in 1\.safetensors"):
        Checkpoint(folder)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
