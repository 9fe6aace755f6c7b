"""A sound folder has no faults; what is broken gets a line with file, tensor and reason, no traceback."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_output import CONFIG, TOKENIZER_CONFIG, VOCABULARY, make_output, make_tokenizer, write_json
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.folder.verify import verify

Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def finished_in_shards(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("many"), max_shard_bytes=40_000)


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def sharded(finished_in_shards, tmp_path):
    return shutil.copytree(finished_in_shards, tmp_path / "out")


def faults(folder):
    """The faults, checksums aside: the tests below change shards on purpose."""
    return [fault for fault in verify(folder).faults if "checksums.json" not in fault]


def change(folder, edit):
    """Apply `edit` to the tensors of the only shard."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_tensors(file, tensors)


def change_json(folder, name, edit):
    value = json.loads((folder / name).read_text())
    edit(value)
    write_json(folder / name, value)


@pytest.mark.parametrize("fixture", ["folder", "sharded"])
def test_a_finished_output_has_neither_faults_nor_warnings(request, fixture):
    report = verify(request.getfixturevalue(fixture))
    assert (report.faults, report.warnings) == ([], [])
    assert report.ok
    assert report.facts["linears"] == 2 * (4 + 2 * 3) + 1
    assert report.facts["family"] == "dbrx"
    assert report.facts["checksums"] is True
    assert 3.5 < report.facts["bpw"] < 5.5


def test_a_checkpoint_of_exllamav2_has_no_faults_but_warnings(shared):
    report = verify(shared / "golden" / "tiny-dbrx-exl2-3.0bpw")
    assert report.faults == []
    text = "\n".join(report.warnings)
    assert "rope_theta is not at the top level" in text
    assert "without [4000, 4007]" in text
    assert "generation_config.json: missing" in text
    assert report.facts["bpw"] == pytest.approx(3.0, abs=0.001)
    assert report.facts["linears"] == 4 * (4 + 16 * 3) + 1


def test_what_is_a_warning_elsewhere_is_a_fault_in_our_own_output(folder):
    change_json(folder, "config.json", lambda c: c.pop("rope_theta"))
    assert any("rope_theta" in fault for fault in faults(folder))
    change_json(folder, "config.json", lambda c: c["quantization_config"].update(version="0.3.2"))
    report = verify(folder)
    assert any("rope_theta" in warning for warning in report.warnings)
    assert report.ok


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "tied llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "qwen3 moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_soundly_also_with_biases_and_a_tied_head(tmp_path, family):
    source = tmp_path / "source"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]()).to(torch.bfloat16).save_pretrained(source)
    make_tokenizer(source)
    report = verify(make_output(tmp_path, max_shard_bytes=60_000, source=source))
    assert (report.faults, report.warnings) == ([], [])


def test_a_dbrx_config_that_names_two_rope_bases_is_reported(folder):
    theta = {"rope_theta": 10000.0, "rope_type": "default"}
    change_json(folder, "config.json", lambda c: c.update(rope_parameters=theta))
    (fault,) = faults(folder)
    assert "different RoPE bases: 500000 in rope_theta, 10000.0 in rope_parameters, 500000 in attn" in fault


def test_a_linear_that_is_stored_twice_is_a_fault(folder):
    change(folder, lambda t: t.update({f"{EXPERT}.weight": torch.zeros(64, 96, dtype=torch.float16)}))
    assert faults(folder) == [
        f"model.safetensors: {EXPERT}.weight: this tensor does not belong to a dbrx model"
    ]


def test_both_naming_styles_of_dbrx_are_read(folder):
    (folder / "checksums.json").unlink()
    change_json(folder, "config.json", lambda c: c["quantization_config"].update(version="0.3.2"))

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.layers", "transformer.blocks")] = tensors.pop(name)

    change(folder, rename)
    assert verify(folder).faults == []


# --- linears -----------------------------------------------------------------------------------------------


def overlap(t):
    t[f"{Q_PROJ}.q_groups"][3] -= 1


def widths_up(t):
    t[f"{Q_PROJ}.q_groups"][0] = 2


def unknown_width(t):
    t[f"{Q_PROJ}.q_groups"][0] = 7


def repeat_row(t):
    t[f"{Q_PROJ}.q_invperm"][0] = t[f"{Q_PROJ}.q_invperm"][1]


def row_outside(t):
    t[f"{Q_PROJ}.q_invperm"][0] = 64


def nan_scale(t):
    t[f"{Q_PROJ}.q_scale_max"][1] = float("nan")


def negative_scale(t):
    t[f"{Q_PROJ}.q_scale_max"][1] = -1


def wrong_dtype(t):
    t[f"{Q_PROJ}.q_weight"] = t[f"{Q_PROJ}.q_weight"].to(torch.int64)


def narrow_scale(t):
    t[f"{Q_PROJ}.q_scale"] = t[f"{Q_PROJ}.q_scale"][:, :4].contiguous()


def no_groups(t):
    del t[f"{Q_PROJ}.q_groups"]


def no_words(t):
    del t[f"{Q_PROJ}.q_weight"]


def with_bias(t):
    t[f"{Q_PROJ}.bias"] = torch.zeros(64, dtype=torch.float16)


def other_shape(t):
    for name in list(t):
        if name.startswith(Q_PROJ):
            t[name] = t[name.replace("q_proj", "k_proj")].clone()


@pytest.mark.parametrize(
    ("edit", "tensor", "reason"),
    [
        (overlap, "q_groups", ""),
        (widths_up, "q_groups", "widths must not increase"),
        (unknown_width, "q_groups", "7 bits"),
        (repeat_row, "q_invperm", "expected a permutation"),
        (row_outside, "q_invperm", "entry 0 is 64, expected 0 to 63"),
        (nan_scale, "q_scale_max", "group 1 is nan"),
        (negative_scale, "q_scale_max", "group 1 is -1"),
        (wrong_dtype, "q_weight", r"dtype torch\.int64, expected torch\.int32"),
        (narrow_scale, "q_scale", r"shape \(2, 4\), expected \(2, 8\)"),
        (no_groups, "q_groups", "missing"),
        (no_words, "q_weight", "missing"),
        (with_bias, "bias", "present, the model's linear has none"),
    ],
)
def test_each_broken_rule_names_file_tensor_and_reason(folder, edit, tensor, reason):
    change(folder, edit)
    wanted = rf"model\.safetensors: {re.escape(Q_PROJ)}\.{tensor}: .*{reason}"
    found = faults(folder)
    assert len(found) == 1, found
    assert re.match(wanted, found[0]), found


def test_a_linear_of_another_shape_than_the_config_says_is_a_fault(folder):
    change(folder, other_shape)
    assert faults(folder) == [
        f"model.safetensors: {Q_PROJ}: is (64, 32) (K, N as stored), the model requires (64, 64)"
    ]


def test_a_missing_expert_is_a_fault(folder):
    change(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(EXPERT)])
    assert faults(folder) == [f"config.json: requires {EXPERT}, which no shard holds"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [(f"{EXPERT}.weight", (64, 96)), ("transformer.blocks.1.ffn.experts.mlp.w2", (192, 64))],
)
def test_an_expert_left_unquantized_is_a_fault(folder, name, shape):
    def leave(tensors):
        for stored in list(tensors):
            if stored.startswith(EXPERT):
                del tensors[stored]
        tensors[name] = torch.zeros(shape, dtype=torch.float16)

    change(folder, leave)
    (fault,) = faults(folder)
    assert fault.startswith(f"model.safetensors: {EXPERT}: the expert matrix was left unquantized")


def leave_dense(tensors, linear, shape):
    for stored in list(tensors):
        if stored.startswith(linear):
            del tensors[stored]
    tensors[f"{linear}.weight"] = torch.zeros(shape, dtype=torch.float16)


def test_a_head_in_16_bits_is_legal_but_not_what_we_write(folder):
    change(folder, lambda t: leave_dense(t, "lm_head", (VOCABULARY, 64)))
    message = "model.safetensors: lm_head: stored in 16 bits, as lm_head.weight"
    assert faults(folder) == [message]
    change_json(folder, "config.json", lambda c: c["quantization_config"].update(version="0.3.2"))
    (folder / "checksums.json").unlink()
    report = verify(folder)
    assert (report.faults, report.warnings) == ([], [message])
    assert report.facts["head_bpw"] == 16


def test_attention_is_quantized_whole_or_not_at_all(folder):
    change_json(folder, "config.json", lambda c: c["quantization_config"].update(version="0.3.2"))
    change(folder, lambda t: leave_dense(t, Q_PROJ, (64, 64)))
    (fault,) = faults(folder)
    assert fault.startswith(f"model.safetensors: {Q_PROJ}: the linear was left unquantized")


def test_a_tensor_without_a_place_is_a_fault(folder):
    change(folder, lambda t: t.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    assert faults(folder) == [
        "model.safetensors: model.layers.0.adapter.weight: this tensor does not belong to a dbrx model"
    ]


# --- 16-bit tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_located(folder, value):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    change(folder, lambda t: t[name][1].__setitem__(7, value))
    assert faults(folder) == [f"model.safetensors: {name}: element [1, 7] is {value}, expected finite values"]


def test_16_bit_tensors_have_their_dtype_and_shape(folder):
    name = "model.norm.weight"
    change(folder, lambda t: t.update({name: torch.ones(64, dtype=torch.bfloat16)}))
    assert faults(folder) == [f"model.safetensors: {name}: dtype BF16, expected F16"]
    change(folder, lambda t: t.update({name: torch.ones(63, dtype=torch.float16)}))
    assert faults(folder) == [f"model.safetensors: {name}: shape (63,), the model requires (64,)"]
    change(folder, lambda t: t.pop(name))
    assert faults(folder) == [f"config.json: requires {name}, which no shard holds"]


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_shard_cut_short_is_reported(folder, keep):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    (fault,) = faults(folder)
    assert "model.safetensors" in fault
    assert "fetch it again" in fault


def test_damaged_headers_are_reported(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:100].ljust(2000, b"\xff"))
    second.write_bytes((8).to_bytes(8, "little") + b"{]      ")
    found = faults(sharded)
    for file in (first, second):
        assert any(file.name in fault for fault in found), found
    assert all("\n" not in fault for fault in found)


def break_shard(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("lose", "indexed"),
    [(break_shard, True), (break_shard, False), (Path.unlink, True)],
    ids=["broken", "broken, without an index", "missing"],
)
def test_the_other_shards_are_checked_where_one_is_lost(sharded, lose, indexed):
    files = sorted(sharded.glob("*.safetensors"))
    at = next(i for i, file in enumerate(files) if f"{Q_PROJ}.q_scale_max" in load_file(file))
    first, lost = files[at], files[at + 1]
    inside = {name.rsplit(".", 1)[0] for name in load_file(lost)}
    tensors = {name: tensor.clone() for name, tensor in load_file(first).items()}
    tensors[f"{Q_PROJ}.q_scale_max"][1] = float("nan")
    tensors["adapter"] = torch.zeros(2)
    save_tensors(first, tensors)
    lose(lost)
    if not indexed:
        (sharded / INDEX_NAME).unlink()
    report = verify(sharded)
    found = [fault for fault in report.faults if "checksums.json" not in fault]
    assert len(found) == 3 + indexed, found
    assert any(lost.name in fault for fault in found)
    assert any(fault.startswith(f"{first.name}: {Q_PROJ}.q_scale_max: group 1 is nan") for fault in found)
    assert f"{first.name}: adapter: this tensor does not belong to a dbrx model" in found
    assert {name.removesuffix(".weight") for name in report.facts["unchecked"]} == inside
    (warning,) = (line for line in report.warnings if "not checked" in line)
    assert f"{len(inside)} linears and 16-bit tensors" in warning
    assert report.facts["unchecked"][0] in warning


def test_a_missing_shard_is_reported(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    found = verify(sharded).faults
    assert len(found) == 2
    assert re.fullmatch(rf"{file.name}: missing; {INDEX_NAME} places \d+ of the tensors in it", found[0])
    assert found[1] == f"{file.name}: missing; checksums.json names it"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.update({"model.extra": m[f"{Q_PROJ}.q_weight"]}), "names model.extra in"),
        (
            lambda m: m.update({"model.extra": "x.safetensors"}),
            "x.safetensors: missing; model.safetensors.in",
        ),
        (lambda m: m.pop(f"{Q_PROJ}.q_weight"), f"omits {Q_PROJ}.q_weight"),
        (lambda m: m.update({f"{Q_PROJ}.q_weight": "elsewhere.safetensors"}), f"places {Q_PROJ}.q_weight in"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_a_fault(sharded, edit, reason):
    change_json(sharded, INDEX_NAME, lambda index: edit(index["weight_map"]))
    found = faults(sharded)
    assert len(found) == 1
    assert reason in found[0]


def test_a_stale_index_of_the_original_is_a_warning(folder):
    write_json(
        folder / INDEX_NAME, {"weight_map": {"transformer.wte.weight": "model-00001-of-00061.safetensors"}}
    )
    report = verify(folder)
    assert report.ok
    assert report.warnings == [f"{INDEX_NAME}: a stale copy of the original's; delete it"]


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_a_fault(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    assert any("not a safetensors index" in fault for fault in faults(sharded))


def test_a_flipped_bit_is_found_by_its_checksum(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert verify(folder).faults == [
        "model.safetensors: its SHA-256 differs from checksums.json; fetch it again"
    ]
    assert verify(folder, checksums=False).ok


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 2, "files": {}}', '{"format_version": 1}'])
def test_unreadable_checksums_are_a_fault(folder, text):
    (folder / "checksums.json").write_text(text)
    assert any(f"{folder}/checksums.json: " in fault for fault in verify(folder).faults)


def test_missing_checksums_are_a_warning_since_save_pretrained_writes_none(folder):
    (folder / "checksums.json").unlink()
    report = verify(folder)
    assert report.faults == []
    (warning,) = report.warnings
    assert warning.startswith("checksums.json: missing, as after save_pretrained")


def test_progress_counts_the_bytes_of_the_shards(sharded):
    calls = []
    verify(sharded, progress=lambda done, total: calls.append((done, total)))
    size = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert calls[-1] == (size, size)


# --- config and tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"model_type": "dbrx"}', '{"model_type": "nonsense"}'),
        json.dumps({**CONFIG, "n_layers": "two"}),
        json.dumps({**CONFIG, "n_heads": 0}),
        json.dumps({**CONFIG, "attn_config": []}),
    ],
)
def test_a_damaged_config_is_a_fault(folder, text):
    (folder / "config.json").write_text(text)
    report = verify(folder)
    assert "config.json" in report.faults[0]
    assert all("\n" not in fault for fault in report.faults)


def test_an_empty_or_absent_folder_is_a_fault(tmp_path):
    assert verify(tmp_path / "nowhere").faults == [f"{tmp_path / 'nowhere'}: no such folder"]
    assert any("no *.safetensors" in fault for fault in verify(tmp_path).faults)


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("config.json", lambda c: c.update(eos_token_id=257), "a chat turn never ends"),
        ("generation_config.json", lambda c: c.pop("eos_token_id"), "a chat turn never ends"),
        ("config.json", lambda c: c.update(pad_token_id=300), "pad_token_id 300 is outside the embedding"),
        ("config.json", lambda c: c.pop("quantization_config"), "random weights"),
        ("config.json", lambda c: c["quantization_config"].update(bpw=2.5), "bpw is 2.5, the shards hold"),
        ("tokenizer.json", lambda c: c["added_tokens"][-1].update(id=300), "the embedding has 300 rows"),
    ],
)
def test_config_and_tokenizer_must_agree_with_the_model(folder, name, edit, reason):
    change_json(folder, name, edit)
    report = verify(folder)
    assert any(reason in line for line in report.faults + report.warnings), report


def test_a_missing_tokenizer_is_a_fault(folder):
    (folder / "tokenizer.json").unlink()
    message = "tokenizer.json: missing; 'dbrx-quant tokenizer' creates it from other files where possible"
    assert verify(folder).faults == [message]


def test_side_files_of_the_tokenizer_must_be_readable(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG)[:-5])
    assert any("tokenizer_config.json" in fault for fault in verify(folder).faults)


def test_a_damaged_chat_template_is_a_fault(folder):
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    assert any("chat_template.jinja: not UTF-8" in fault for fault in verify(folder).faults)
    (folder / "chat_template.jinja").write_text("{{ messages[0] / 0 }}")
    assert any("cannot be rendered" in fault for fault in verify(folder).faults)
