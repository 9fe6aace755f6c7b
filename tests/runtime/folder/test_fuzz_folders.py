"""Damaged folders, at random: they are refused by one of our own errors that names a file, or they run.

`verify`, `inspect`, `load_model` and one generated token each see the same folder. What `verify` calls sound
has to run; nothing may hang, and no other error may come out.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import warnings
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from small_configs import CONFIGS
from tiny_output import CONFIG, make_output, make_source, make_tokenizer
from transformers import AutoModelForCausalLM, logging

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME, Checksum, write_checksums
from dbrx_quant.runtime.folder.inspect import inspect_folder
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

SECONDS = 30
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 10**30, -(10**12), 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", "x", "1", "128", "\ud800", "../../etc/passwd", [], {}, [None], [[]]),
    *([1, 2], ["x"], {"a": 1}, {"": None}, [0.5] * 9, "<|endoftext|>", "cpu", "default", "float16"),
]
# Fields that a reader knows and that a sound folder need not have.
FIELDS = {
    "config.json": [
        "attention_bias",
        "clip_qkv",
        "dtype",
        "head_dim",
        "hidden_act",
        "id2label",
        "layer_types",
        "mlp_bias",
        "mlp_only_layers",
        "num_labels",
        "pad_token_id",
        "partial_rotary_factor",
        "pruned_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "use_cache",
        "use_sliding_window",
        "max_window_layers",
        "norm_topk_prob",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "transformers_weights",
        "attn_implementation",
        "is_encoder_decoder",
        "is_decoder",
        "problem_type",
        "pretraining_tp",
        "quantization_config",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size",
    ],
    "generation_config.json": [
        "assistant_confidence_threshold",
        "bad_words_ids",
        "cache_implementation",
        "cache_config",
        "use_cache",
        "compile_config",
        "constraints",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dola_layers",
        "early_stopping",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "low_memory",
        "max_length",
        "max_matching_ngram_size",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "output_attentions",
        "penalty_alpha",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict_in_generate",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "temperature",
        "begin_suppress_tokens",
        "token_healing",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "watermarking_config",
    ],
    "tokenizer_config.json": [
        "add_bos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "auto_map",
        "backend",
        "bos_token",
        "chat_template",
        "clean_up_tokenization_spaces",
        "extra_special_tokens",
        "init_inputs",
        "legacy",
        "model_input_names",
        "model_max_length",
        "padding_side",
        "sp_model_kwargs",
        "split_special_tokens",
        "tokenizer_class",
        "truncation_side",
        "unk_token",
        "use_fast",
        "vocab_file",
    ],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders without a fault, as name → content of their files."""
    return [content(folder) for folder in sound_folders(tmp_path_factory.mktemp("sound"))]


def sound_folders(place):
    torch.manual_seed(0)
    yield make_output(place / "dbrx", 40_000, make_source(place / "dbrx", config=CONFIG))
    for family in ("llama", "qwen3 moe"):
        source = place / family
        config = CONFIGS[family]()
        config.vocab_size = 300
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
        make_tokenizer(source)
        yield make_output(source, source=source)


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


# --- damage ------------------------------------------------------------------------------------------------


def places(value, path=()):
    """The way to every field of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, field in inner:
        yield (*path, key)
        yield from places(field, (*path, key))


def damage_json(name, raw, rng):
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2))):
        fields = list(places(value))
        if name in FIELDS and isinstance(value, dict) and rng.random() < 0.4:
            value[rng.choice(FIELDS[name])] = deepcopy(rng.choice(VALUES))
            continue
        if not fields:
            break
        *way, last = rng.choice(fields)
        inner = value
        for key in way:
            inner = inner[key]
        act = rng.random()
        if act < 0.15:
            del inner[last]
        elif act < 0.25 and isinstance(inner, dict):
            inner[rng.choice(("x", "", str(last) + "_"))] = inner.pop(last)
        elif act < 0.4 and isinstance(inner[last], int):
            inner[last] = inner[last] * rng.choice((2, -1, 3)) + rng.choice((-1, 0, 1))
        else:
            inner[last] = deepcopy(rng.choice(VALUES))
    return json.dumps(value).encode()


def damage_bytes(raw, rng):
    made = bytearray(raw)
    act = rng.randrange(6)
    if act == 0:
        return bytes(made[: rng.randrange(len(made) + 1)])
    if act == 1:
        return bytes(made) + rng.randbytes(rng.choice((1, 8, 100)))
    if act == 2:
        return rng.choice(
            (b"", b"[" * 100_000, b"{}", b"[]", b"null", b"\xff\xfe", b'{"a":1e999}', b"\0" * 64)
        )
    for _ in range(rng.choice((1, 1, 4, 40))):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def damage_shard(raw, rng):
    """Damage to the length of the header, its JSON, a tensor's data, or anything."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], bytearray(raw[8 + length :])
    act = rng.random()
    if act < 0.1:
        return damage_bytes(raw, rng)
    if act < 0.4:
        entries = json.loads(header)
        entry = entries[rng.choice(list(entries))]
        if rng.random() < 0.3:
            a, b = rng.sample(sorted(entries), 2)
            entries[a], entries[b] = entries[b], entries[a]
        elif rng.random() < 0.5:
            entries[rng.choice(list(entries)) + rng.choice(("", "x", ".q_weight"))] = entry
        header = (
            damage_json("", json.dumps(entries).encode(), rng)
            if rng.random() < 0.6
            else json.dumps(entries).encode()
        )
    elif act < 0.5:
        header = damage_bytes(header, rng)
    else:
        entries = {name: e for name, e in json.loads(header).items() if name != "__metadata__"}
        begin, end = rng.choice(list(entries.values()))["data_offsets"]
        for _ in range(rng.choice((1, 2, 8))):
            if end > begin:
                at = rng.randrange(begin, end) & ~1
                data[at : at + 2] = rng.choice(
                    (b"\0\x7e", b"\0\x7c", b"\0\xfc", b"\xff\x7b", rng.randbytes(2))
                )
    return len(header).to_bytes(8, "little") + header + bytes(data)


def damage(files, rng):
    """The files of a folder with some damage; a value may be None (missing), "fifo", "folder" or a link."""
    made = dict(files)
    name = rng.choice(
        [n for n in made for _ in range(4 if n.endswith((".safetensors", "onfig.json")) else 1)]
    )
    act = rng.random()
    if act < 0.06:
        made[name] = rng.choice(
            (None, "fifo", "folder", "link:nowhere", "link:/dev/zero", "link:/etc/passwd")
        )
    elif act < 0.1:
        made[name] = made[rng.choice(list(made))]
    elif name.endswith(".safetensors"):
        made[name] = damage_shard(made[name], rng)
    elif name.endswith(".json") and act < 0.85:
        made[name] = damage_json(name, made[name], rng)
    else:
        made[name] = damage_bytes(made[name], rng)
    return name, made


def write(folder, damaged, files):
    folder.mkdir()
    for name, raw in files.items():
        if isinstance(raw, bytes):
            (folder / name).write_bytes(raw)
        elif raw == "fifo":
            os.mkfifo(folder / name)
        elif raw == "folder":
            (folder / name).mkdir()
        elif raw is not None:
            (folder / name).symlink_to(raw.removeprefix("link:"))
    if damaged != CHECKSUMS_NAME:  # which would hide what else is found
        shards = {n: raw for n, raw in files.items() if n.endswith(".safetensors") and isinstance(raw, bytes)}
        sums = {n: Checksum(hashlib.sha256(raw).hexdigest(), len(raw)) for n, raw in shards.items()}
        write_checksums(folder, sums, {})


# --- the readers -------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A reader did not come to an end."""


@contextmanager
def time_limit():
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read):
    """("ok", its result), or the kind and the text of what it raised."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "ok", read()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, str(error)


def one_token(folder, model):
    ids = load_tokenizer(folder)("a list", return_tensors="pt")["input_ids"].long()
    logits = model(ids).logits
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    return bool(torch.isfinite(logits).all())


def faults_of(seed, sound, place):
    """Whatever is wrong with how the readers take damage number `seed`, a line each."""
    rng = random.Random(seed)
    name, files = damage(rng.choice(sound), rng)
    folder = place / f"damaged-{seed}"
    write(folder, name, files)
    found = []
    try:
        kind, report = outcome(lambda: verify(folder))
        if kind != "ok":
            found.append(f"verify: {kind}: {report}")
        elif not all(names_a_file(fault, files, folder) for fault in report.faults):
            found.append(f"verify names no file: {report.faults}")
        verified = kind == "ok" and report.ok
        inspected, text = outcome(lambda: inspect_folder(folder))
        loaded, model = outcome(lambda: load_model(folder))
        for what, kind, said in (("inspect", inspected, text), ("load", loaded, model)):
            if kind not in ("ok", CheckpointError.__name__):
                found.append(f"{what}: {kind}: {said}")
            elif kind != "ok" and (verified or not names_a_file(said, files, folder)):
                found.append(f"{what}, verified {verified}: {said}")
        if loaded == "ok":
            kind, finite = outcome(lambda: one_token(folder, model))
            if kind in ("Hang", "MemoryError") or (verified and (kind, finite) != ("ok", True)):
                found.append(f"one token, verified {verified}: {kind}: {finite}")
    finally:
        shutil.rmtree(folder)
    return [f"seed {seed}, {name}: {line[:300]}" for line in found]


def names_a_file(text, files, folder):
    return str(folder) in text or any(name in text for name in (*files, "index.json"))


@pytest.fixture(autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(level)


def test_damaged_folders_are_refused_or_run(sound, tmp_path):
    assert [line for seed in range(20) for line in faults_of(seed, sound, tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_damaged_folders_are_refused_or_run(sound, tmp_path, hundred):
    seeds = range(100 * hundred, 100 * hundred + 100)
    assert [line for seed in seeds for line in faults_of(seed, sound, tmp_path)] == []
