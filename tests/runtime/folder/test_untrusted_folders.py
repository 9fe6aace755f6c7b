"""Folders of strangers: sizes that cannot be, files that are none, values that are not finite, odd fields.

Each is refused at once, by `verify`, `inspect` and `load_model` alike; what `verify` calls sound runs.
"""

import json
import os
import re
import shutil

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from safetensors.torch import load_file
from tiny_output import make_output, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.inspect import inspect_folder
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

READERS = {"inspect": inspect_folder, "load": load_model, "verify": lambda folder: refused(verify(folder))}


def refused(report):
    if report.faults:
        raise CheckpointError("\n".join(report.faults))


def refusal(reader, folder):
    """What a reader says against a folder; None if it takes it."""
    try:
        reader(folder)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("one"))


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def change_json(file, edit):
    value = json.loads(file.read_text())
    edit(value)
    write_json(file, value)


def change_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_tensors(file, tensors)
    (folder / "checksums.json").unlink(missing_ok=True)


# --- numbers ------------------------------------------------------------

COUNTS = {
    "dbrx": (
        "n_layers",
        "num_hidden_layers",
        "ffn_config.moe_num_experts",
        "num_labels",
        "ffn_config.num_labels",
    ),
    "llama": ("num_hidden_layers", "num_labels"),
    "mixtral": ("num_hidden_layers", "num_local_experts", "num_experts"),
    "qwen2 moe": ("num_hidden_layers", "num_experts", "num_labels"),
    "qwen3 moe": ("num_hidden_layers", "num_experts", "num_local_experts"),
}
SIZES = {
    "dbrx": ("d_model", "n_heads", "attn_config.kv_n_heads", "ffn_config.ffn_hidden_size", "vocab_size"),
    "llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    "qwen3 moe": ("hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim", "vocab_size"),
}


def put(config, key, value):
    *way, last = key.split(".")
    for step in way:
        config = config[step]
    config[last] = value


@pytest.mark.parametrize(("family", "key"), [(f, key) for f, keys in COUNTS.items() for key in keys])
@pytest.mark.parametrize("number", [10**9, 10**30])
def test_counts_that_the_shards_cannot_hold_are_refused_before_anything_loops_over_them(
    tmp_path, family, key, number
):
    folder = build_quantized_folder(CONFIGS[family](), tmp_path / "q").path
    change_json(folder / "config.json", lambda c: put(c, key, number))
    for reader in READERS.values():
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{key.split('.')[-1]} {number}"):
            reader(folder)


@pytest.mark.parametrize(("family", "key"), [(f, key) for f, keys in SIZES.items() for key in keys])
@pytest.mark.parametrize("value", [10**9, 0, -1, 2.5, "64", None, [64], {}, True])
def test_sizes_that_are_not_those_of_the_tensors_are_refused(tmp_path, family, key, value):
    folder = build_quantized_folder(CONFIGS[family](), tmp_path / "q").path
    change_json(folder / "config.json", lambda c: put(c, key, value))
    for name in ("inspect", "load"):
        said = refusal(READERS[name], folder)
        if said is None:
            assert value is None or (key, value) == ("head_dim", 0)  # transformers has a default instead
        else:
            assert str(folder) in said or "config.json" in said


@pytest.mark.parametrize("active", [0, -1, 3, 1000, None, "1", 1.0])
def test_as_many_experts_are_active_as_there_are(folder, active):
    change_json(folder / "config.json", lambda c: c["ffn_config"].update(moe_top_k=active))
    for reader in READERS.values():
        with pytest.raises(CheckpointError, match=r"config\.json"):
            reader(folder)


# --- files ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["x.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_fifo_is_refused_by_every_reader(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for reader in (*READERS.values(), load_tokenizer):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: a FIFO"):
            reader(folder)


@pytest.mark.parametrize(
    "name", ["../out/model.safetensors", "/etc/passwd", "..", "config.json", "a/b.safetensors"]
)
def test_checksums_are_of_shards_in_the_folder_alone(folder, name):
    change_json(folder / "checksums.json", lambda c: c["files"].update({name: {"sha256": "", "size": 1}}))
    (fault,) = verify(folder).faults
    assert fault.startswith(f"{folder}/checksums.json: files is a list with '{name}'")


def test_a_shard_that_is_a_link_out_of_the_folder_is_not_hashed(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert verify(folder).faults == [
        "model.safetensors: a link out of the folder; put the shard itself there"
    ]


def test_a_snapshot_in_the_cache_of_the_hub_is_sound(finished, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(finished.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert verify(snapshot).faults == []


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", ""])
def test_an_index_names_shards_of_the_folder_alone(folder, file):
    names = list(load_file(folder / "model.safetensors"))
    weight_map = dict.fromkeys(names, "model.safetensors") | {"x.q_weight": file}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    (fault,) = verify(folder).faults
    index = folder / "model.safetensors.index.json"
    assert fault == f"{index}: places a tensor in {file!r}, expected the name of a file beside it"


# --- values ------------------------------------------------------------

VALUES = {
    "dbrx": ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.block_sparse_moe.gate.weight"),
    "qwen2": ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.input_layernorm.weight"),
    "qwen3": ("model.layers.0.self_attn.k_norm.weight", "lm_head.q_scale_max"),
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in VALUES.items() for name in names])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_models_with_values_that_are_not_finite_are_not_loaded(tmp_path, family, name, value):
    made = build_quantized_folder(CONFIGS[family](), tmp_path / "q")
    made.tensors[name].view(-1)[-1] = value
    made.write()
    message = rf"model\.safetensors: {re.escape(name)}: .*{value}"
    with pytest.raises(CheckpointError, match=message):
        load_model(made.path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(made.path)


def test_a_head_in_16_bits_is_looked_through_too(tmp_path):
    made = build_quantized_folder(CONFIGS["llama"](), tmp_path / "q", head=False)
    made.tensors["lm_head.weight"][3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: element \[3, 5\] is nan"):
        load_model(made.write().path)


def test_a_finite_scale_with_infinite_weights_is_refused(folder):
    name = "model.layers.0.self_attn.q_proj.q_scale_max"
    change_tensors(folder, lambda t: t[name].fill_(60000))
    for reader in READERS.values():
        with pytest.raises(CheckpointError, match=re.escape(name) + ".*half precision"):
            reader(folder)


# --- what breaks no rule and does not run ------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "rope_theta", -1.0),
        ("config.json", "rope_theta", "x"),
        ("config.json", "n_heads", 3),
        ("config.json", "rope_scaling", {"rope_type": "none such"}),
        ("generation_config.json", "watermarking_config", ""),
        ("generation_config.json", "num_beams", 10**7),
        ("generation_config.json", "cache_implementation", "none such"),
        ("generation_config.json", "temperature", {}),
        ("generation_config.json", "penalty_alpha", "x"),
        ("generation_config.json", "bad_words_ids", 5),
        ("tokenizer_config.json", "model_max_length", "128"),
        ("tokenizer_config.json", "extra_special_tokens", 1000),
        ("tokenizer_config.json", "auto_map", 5),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": None}),
        ("special_tokens_map.json", "eos_token", []),
        ("tokenizer.json", "pre_tokenizer", {"type": "Split", "pattern": 5}),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}),
        ("tokenizer.json", "decoder", {"type": "Sequence"}),
    ],
)
def test_what_verify_calls_sound_runs(folder, file, key, value):
    change_json(folder / file, lambda c: c.update({key: value}))
    report = verify(folder)
    if report.ok:  # the libraries take it, by chance or on purpose
        ids = load_tokenizer(folder)("a list", return_tensors="pt")["input_ids"]
        model = load_model(folder)
        assert torch.isfinite(model(ids).logits).all()
        model.generate(ids, max_new_tokens=1)
    else:
        assert all(str(folder) in fault or fault.startswith(file) for fault in report.faults), report.faults


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"null", b"5", b"", b"\xff\xfe", b'{"a": 1e999}', b"{}"])
def test_a_damaged_side_file_is_named_by_every_reader(folder, name, content):
    (folder / name).write_bytes(content)
    for reader in (*READERS.values(), load_tokenizer):
        said = refusal(reader, folder)
        assert said is None or str(folder) in said or name in said


# --- saved again ------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
def test_a_model_that_was_saved_again_is_sound_and_saves_again(folder, tmp_path, load, shard_size):
    sampling = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [257, 260]}
    change_json(folder / "generation_config.json", lambda c: c.update(sampling))
    model = load(folder)
    for saved in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(saved, max_shard_size=shard_size)
        AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
        report = verify(saved)
        assert report.faults == []
        assert [line.split(":")[0] for line in report.warnings] == ["checksums.json"]
        kept = json.loads((saved / "generation_config.json").read_text())
        assert {key: kept[key] for key in sampling} == sampling
        model = load(saved)
