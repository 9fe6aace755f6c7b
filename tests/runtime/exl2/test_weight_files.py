"""The files of a model are those of its index or of the usual names, whatever lies beside them."""

import json

import pytest

from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME, weight_files
from dbrx_quant.runtime.files.errors import CheckpointError

SET = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def fill(folder, *names, index=()):
    for name in names:
        (folder / name).write_bytes(b"")
    if index:
        weight_map = {str(i): name for i, name in enumerate(index)}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "beside",
    [
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "._model-00001-of-00002.safetensors",
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "pytorch_model.bin",
        "notes.txt",
    ],
)
def test_an_index_chooses_the_shards_of_an_original(tmp_path, beside):
    fill(tmp_path, *SET, beside, index=SET)
    assert [file.name for file in weight_files(tmp_path, source=True)] == list(SET)


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize(
    "beside", ["consolidated.safetensors", "adapter_model.safetensors", "._model.safetensors"]
)
def test_strangers_do_not_count_without_an_index(tmp_path, beside, source):
    fill(tmp_path, "model.safetensors", beside)
    assert [file.name for file in weight_files(tmp_path, source)] == ["model.safetensors"]


@pytest.mark.parametrize("beside", [*SET, "model.fp16.safetensors", "old.safetensors"])
def test_the_one_file_of_an_original_stands_for_itself(tmp_path, beside):
    fill(tmp_path, "model.safetensors", beside)
    assert [file.name for file in weight_files(tmp_path, source=True)] == ["model.safetensors"]


def test_every_shard_of_a_quantized_folder_counts_beside_a_stale_index(tmp_path):
    fill(tmp_path, "output-1.safetensors", "output-2.safetensors", index=SET)
    assert len(weight_files(tmp_path)) == 2


def test_bin_files_count_where_an_original_has_nothing_else(tmp_path):
    fill(tmp_path, "pytorch_model-00001-of-00001.bin", "optimizer.bin", "adapter_model.bin")
    assert [file.name for file in weight_files(tmp_path, source=True)] == ["pytorch_model-00001-of-00001.bin"]
    fill(tmp_path, "model.safetensors")
    assert [file.name for file in weight_files(tmp_path, source=True)] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_names_only_files_beside_it(tmp_path, name):
    fill(tmp_path, *SET, index=(*SET, name))
    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        weight_files(tmp_path, source=True)


def test_a_shard_of_the_index_that_is_not_there_is_named(tmp_path):
    fill(tmp_path, SET[0], "model.safetensors", index=SET)
    with pytest.raises(CheckpointError, match=f"names the shard {SET[1]}, which isn't there"):
        weight_files(tmp_path, source=True)
