"""Shards hold every tensor once, byte for byte, in files that are whole or absent."""

import errno
import hashlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_output import (
    HIDDEN,
    VOCABULARY,
    make_source,
    quantize_randomly,
    source_tensors,
)

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.shards import write as shards
from dbrx_quant.runtime.shards.plan import module_order
from dbrx_quant.runtime.shards.write import check_floats, rounding_notes, write_shards

SMALL = 40_000  # bytes a shard: several linears in one, and a head that needs shards of its own


@pytest.fixture
def work(tmp_path):
    source = make_source(tmp_path / "source")
    architecture = describe(load_config(source))
    linears = quantize_randomly(architecture, tmp_path / "linears")
    return SimpleNamespace(
        source=source,
        architecture=architecture,
        checkpoint=architecture.open(source),
        linears=linears,
        out=tmp_path / "out",
    )


def write(work, **options):
    return write_shards(work.out, work.architecture, work.checkpoint, work.linears, **options)


def loaded(paths):
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def test_shards_hold_the_linears_unchanged_and_the_rest_as_float16(work):
    found = loaded(write(work))
    wanted = {}
    for file in work.linears.iterdir():
        wanted |= load_file(file)
    for kept in work.architecture.all_floats():
        wanted[kept.name] = work.checkpoint.load(kept.name).to(torch.float16)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_one_shard_has_the_plain_name_and_no_index(work):
    assert [path.name for path in write(work)] == ["model.safetensors"]
    assert not (work.out / INDEX_NAME).exists()
    with safe_open(work.out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_shards_are_numbered_stay_below_the_limit_and_have_a_right_index(work):
    paths = write(work, max_shard_bytes=SMALL)
    count = len(paths)
    assert count > 3
    assert [p.name for p in paths] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((work.out / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: path.name for path in paths for name in load_file(path)}
    tensors = loaded(paths).values()
    assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in tensors)}
    for path in paths:
        assert path.stat().st_size <= SMALL or len(load_file(path)) == 1, path


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(work):
    embedding = "model.embed_tokens.weight"
    paths = write(work, max_shard_bytes=VOCABULARY * HIDDEN * 2)
    holder = next(path for path in paths if embedding in load_file(path))
    assert list(load_file(holder)) == [embedding]


def test_the_tensors_of_a_linear_stay_in_one_shard(work):
    paths = write(work, max_shard_bytes=SMALL)
    for spec in work.architecture.linears():
        holders = {p for p in paths for n in load_file(p) if n.rpartition(".")[0] == spec.name}
        assert len(holders) == 1 or spec.role == "head", spec.name


def test_packed_words_are_aligned_in_the_file(work):
    for path in write(work, max_shard_bytes=SMALL):
        for name, info in Checkpoint(path.parent)._infos.items():
            assert info.start % 16 == 0 or not name.endswith(("q_weight", "q_scale", "q_invperm", ".weight"))
        with path.open("rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % 64 == 0


def test_modules_come_in_the_order_of_the_model(work):
    names = [spec.name.removesuffix(".weight") for spec in module_order(work.architecture)]
    block = "model.layers.0"
    assert names[:9] == [
        "model.embed_tokens",
        f"{block}.input_layernorm",
        *(f"{block}.self_attn.{part}_proj" for part in "qkvo"),
        f"{block}.post_attention_layernorm",
        f"{block}.block_sparse_moe.gate",
        f"{block}.block_sparse_moe.experts.0.w1",
    ]
    assert names[9:12] == [f"{block}.block_sparse_moe.experts.{part}" for part in ("0.v1", "0.w2", "1.w1")]
    assert names[-2:] == ["model.norm", "lm_head"]


def test_equal_inputs_give_equal_bytes(work, tmp_path):
    first = write(work, max_shard_bytes=SMALL)
    before = {file.name: file.read_bytes() for file in work.out.iterdir()}
    work.out = tmp_path / "again"
    write(work, max_shard_bytes=SMALL)
    after = {file.name: file.read_bytes() for file in work.out.iterdir()}
    assert before == after
    assert len(before) == len(first) + 2, "the shards, their index and their checksums"


def test_checksums_name_size_and_digest_of_every_shard(work):
    paths = write(work, max_shard_bytes=SMALL)
    content = json.loads((work.out / "checksums.json").read_text())
    assert content["files"] == {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        for path in paths
    }


def test_what_a_previous_run_left_is_removed(work):
    old = write(work, max_shard_bytes=SMALL)
    (work.out / ".model.safetensors.0badcafe.part").write_bytes(b"half")
    (path,) = write(work)
    assert sorted(file.name for file in work.out.iterdir()) == ["checksums.json", path.name]
    assert not any(file.exists() for file in old)


def test_foreign_weights_in_the_output_are_refused(work):
    work.out.mkdir()
    save_file({"a": torch.zeros(1)}, work.out / "pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.safetensors: not written by this converter"):
        write(work)
    assert (work.out / "pytorch_model.safetensors").exists()


def test_writing_into_the_source_is_refused(work):
    work.out = work.source
    with pytest.raises(ValueError, match="must differ"):
        write(work)


def test_an_interrupted_write_leaves_no_half_shard_and_the_next_run_finishes(work, monkeypatch):
    written, digested = 0, shards._digested

    def stop(parts, digest):
        nonlocal written
        for part in digested(parts, digest):
            yield part
            written += len(part)
            if written > 2 * SMALL:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_digested", stop)
        with pytest.raises(KeyboardInterrupt):
            write(work, max_shard_bytes=SMALL)
    left = list(work.out.iterdir())
    assert left, "the first shard was finished"
    for file in left:
        load_file(file)  # whole
    paths = write(work, max_shard_bytes=SMALL)
    assert len(loaded(paths)) == 5 * len(list(work.architecture.linears())) + 2 + 3 * 2
    assert sorted(f.name for f in work.out.iterdir()) == sorted(
        [*(path.name for path in paths), INDEX_NAME, "checksums.json"]
    )


def test_a_missing_linear_is_named_before_anything_is_written(work):
    name = "model.layers.1.block_sparse_moe.experts.1.v1"
    (work.linears / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{name} has not been quantized")):
        write(work)
    assert list(work.out.iterdir()) == []


def test_a_linear_of_another_shape_is_refused(work):
    file = work.linears / "model.layers.0.self_attn.q_proj.safetensors"
    other = load_file(work.linears / "model.layers.0.self_attn.k_proj.safetensors")
    save_tensors(file, {name.replace("k_proj", "q_proj"): tensor for name, tensor in other.items()})
    with pytest.raises(
        CheckpointError, match=r"q_proj: is \(64, 32\) \(K, N\), the model requires \(64, 64\)"
    ):
        write(work)


def test_a_linear_that_breaks_the_format_is_refused(work):
    name = "model.layers.0.self_attn.q_proj"
    file = work.linears / f"{name}.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.q_invperm"][0] = tensors[f"{name}.q_invperm"][1]
    save_tensors(file, tensors)
    with pytest.raises(CheckpointError, match="expected a permutation"):
        write(work)


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_a_value_that_float16_cannot_hold_is_an_error_naming_the_tensor(work, tmp_path, value):
    tensors = source_tensors()
    tensors["transformer.blocks.1.ffn.router.layer.weight"][1, 3] = value
    source = make_source(tmp_path / "other", tensors)
    work.checkpoint = work.architecture.open(source)
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.gate\.weight"):
        write(work)
    assert list(work.out.iterdir()) == []


def test_values_lost_to_float16s_small_range_are_counted(work, tmp_path):
    tensors = source_tensors()
    norm = "transformer.norm_f.weight"
    tensors[norm][:3] = torch.tensor([1e-9, -1e-12, 0.0])  # two vanish, a zero stays one
    tensors[norm][3:5] = torch.tensor([2.0**-20, 1.0078125 * 2.0**-20])  # exact; loses its last bits
    work.checkpoint = work.architecture.open(make_source(tmp_path / "other", tensors))
    write(work)
    notes = rounding_notes(check_floats(work.architecture, work.checkpoint))
    assert [note for note in notes if "model.norm" in note] == [
        "model.norm.weight: too small for float16: 2 values became zero, 1 lost precision"
    ]
    content = json.loads((work.out / "checksums.json").read_text())
    assert content["rounded_to_zero"] == {"model.norm.weight": 2}


def test_a_full_disk_is_noticed_before_writing(work, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="1000 are free") as caught:
        write(work)
    assert caught.value.errno == errno.ENOSPC
    assert list(work.out.iterdir()) == []


def test_files_that_get_replaced_give_their_room_back(work, monkeypatch):
    paths = write(work, max_shard_bytes=SMALL)
    largest = max(path.stat().st_size for path in paths)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=largest))
    assert write(work, max_shard_bytes=SMALL) == paths
