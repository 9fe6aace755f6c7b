"""The tokenizer files of an output have exact ids, agree with each other, and load as tokenizer.json says."""

import json
import shutil

import pytest
from tiny_output import (
    ADDED,
    CHATML,
    TOKENIZER_CONFIG,
    VOCABULARY,
    make_tokenizer,
    tokenizer_json,
    write_json,
)
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.fix import check_tokenizer, write_tokenizer
from dbrx_quant.runtime.tokenizer.ids import SpecialIds, read_vocabulary, set_ids, special_ids, turn_end
from dbrx_quant.runtime.tokenizer.repair import apply_repair, check_folder, plan_repair

CHAT = [{"role": "user", "content": "2024 cafés?"}, {"role": "assistant", "content": "No, 1999."}]


@pytest.fixture
def source(tmp_path):
    make_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def fatal(folder, vocabulary=VOCABULARY):
    return [str(problem) for problem in check_tokenizer(folder, vocabulary) if problem.fatal]


def test_the_library_shifts_added_tokens_behind_a_hole(source):
    """The trap that the writer is for; if this fails, the library has changed."""
    assert Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("<|endoftext|>") == 256
    assert any("declared as 257 but becomes 256" in problem for problem in fatal(source))


def test_holes_are_filled_so_that_every_token_has_its_declared_id(source, out):
    notes = write_tokenizer(source, out, VOCABULARY)
    assert "filled 1 unused id with placeholders: 256" in notes
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert {content: tokenizer.token_to_id(content) for content in ADDED} == ADDED
    assert tokenizer.id_to_token(256) == "<|reserved_256|>"
    assert fatal(out) == []


def test_holes_inside_the_models_vocabulary_are_filled_there(source, out):
    vocab = {k: v for k, v in tokenizer_json()["model"]["vocab"].items() if v != 17} | {"ab": 256}
    write_json(source / "tokenizer.json", tokenizer_json(vocab=vocab))
    write_tokenizer(source, out, VOCABULARY)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.token_to_id("ab") == 256
    assert tokenizer.id_to_token(17) == "<|reserved_17|>"
    assert tokenizer.token_to_id("<|im_end|>") == 260


def test_a_tokenizer_without_faults_is_copied_byte_for_byte(source, out):
    text = json.dumps(tokenizer_json({"<|hole|>": 256, **ADDED}), indent=3)
    (source / "tokenizer.json").write_text(text)
    notes = write_tokenizer(source, out, VOCABULARY)
    assert (out / "tokenizer.json").read_text() == text
    assert notes == ["set tokenizer_class to PreTrainedTokenizerFast (was GPT2Tokenizer)"]


def test_added_tokens_listed_out_of_order_are_sorted(source, out):
    added = dict(reversed({"<|hole|>": 256, **ADDED}.items()))
    write_json(source / "tokenizer.json", tokenizer_json(added))
    assert "sorted the added tokens by id" in write_tokenizer(source, out, VOCABULARY)
    assert Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("<|im_end|>") == 260


def test_the_output_loads_in_transformers_with_the_splitting_of_tokenizer_json(source, out):
    write_tokenizer(source, out, VOCABULARY)
    write_json(out / "config.json", {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]})
    auto = AutoTokenizer.from_pretrained(out)
    exact = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in ("in 1969, 3x7=21", "  naïve\n\n<|im_start|>user<|im_end|>"):
        assert auto(text)["input_ids"] == exact.encode(text).ids
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (257, 257, 258)
    assert len(auto) == 261


def test_chatml_markers_are_single_ids_and_a_chat_comes_back(source, out):
    write_tokenizer(source, out, VOCABULARY)
    auto = AutoTokenizer.from_pretrained(out)
    text = auto.apply_chat_template(CHAT, tokenize=False)
    ids = auto.apply_chat_template(CHAT, return_dict=False)
    assert (ids.count(259), ids.count(260)) == (2, 2)
    assert auto.decode(ids) == text


def test_side_files_are_complete_and_agree(source, out):
    config = {k: v for k, v in TOKENIZER_CONFIG.items() if k != "chat_template"}
    write_json(source / "tokenizer_config.json", config | {"additional_special_tokens": ["<|im_end|>"]})
    (source / "chat_template.jinja").write_text(CHATML)
    write_tokenizer(source, out, VOCABULARY)
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|reserved_256|>": 256, **ADDED}
    assert json.loads((out / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_end|>"],
    }
    assert (out / "chat_template.jinja").read_text() == CHATML
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHATML, "older readers"


def test_tokens_that_only_side_files_know_are_added(source, out):
    write_json(source / "tokenizer.json", tokenizer_json({"<|endoftext|>": 257}))
    write_json(source / "added_tokens.json", {"<|im_start|>": 259, "<|im_end|>": 260})
    decoder = {"258": {"content": "<|pad|>", "lstrip": False, "rstrip": False, "special": True}}
    write_json(source / "tokenizer_config.json", TOKENIZER_CONFIG | {"added_tokens_decoder": decoder})
    notes = write_tokenizer(source, out, VOCABULARY)
    assert "added '<|im_end|>' as token 260, which tokenizer.json did not have" in notes
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert {content: tokenizer.token_to_id(content) for content in ADDED} == ADDED
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(number): entry["content"] for number, entry in decoder.items()} == {
        256: "<|reserved_256|>",
        **{number: content for content, number in ADDED.items()},
    }
    assert fatal(out) == []


def test_remote_tokenizer_code_is_not_asked_for(source, out):
    remote = {
        "auto_map": {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]},
        "tokenizer_class": "TiktokenTokenizerWrapper",
    }
    write_json(source / "tokenizer_config.json", TOKENIZER_CONFIG | remote)
    write_tokenizer(source, out, VOCABULARY)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in config
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>") == 260


def test_files_that_contradict_each_other_are_refused(source, out):
    write_json(source / "added_tokens.json", {"<|im_end|>": 259})
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' is token 260, another file .* says 259"):
        write_tokenizer(source, out, VOCABULARY)


def test_an_id_outside_the_embedding_is_refused(source, out):
    with pytest.raises(CheckpointError, match=r"has id 260, the model's vocabulary has 260 rows"):
        write_tokenizer(source, out, 260)
    write_tokenizer(source, out, VOCABULARY)
    assert any("has id 260, the embedding has 260 rows" in problem for problem in fatal(out, 260))


def test_a_tokenizer_json_is_made_from_vocabulary_files(source, out):
    tokenizer = tokenizer_json()
    write_json(source / "vocab.json", tokenizer["model"]["vocab"] | {"<|endoftext|>": 256})
    (source / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    write_json(source / "tokenizer_config.json", config)
    write_json(source / "config.json", {"model_type": "gpt2"})
    (source / "tokenizer.json").unlink()
    notes = write_tokenizer(source, out, VOCABULARY)
    assert notes[0] == "made tokenizer.json from vocab.json"
    assert Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("<|endoftext|>") == 256
    assert fatal(out) == []


def test_a_source_without_a_usable_tokenizer_is_a_clear_error(source, out):
    (source / "tokenizer.json").unlink()
    (source / "tiktoken.py").write_text("")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json .*\(found tiktoken\.py"):
        write_tokenizer(source, out, VOCABULARY)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}'])
def test_a_damaged_tokenizer_is_refused_and_reported(source, out, text):
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_tokenizer(source, out, VOCABULARY)
    assert len(fatal(source)) == 1


def broken(folder, change):
    parsed = json.loads((folder / "tokenizer.json").read_text())
    change(parsed)
    write_json(folder / "tokenizer.json", parsed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["added_tokens"][3].update(id=258), "id 258 belongs to '<|im_start|>', '<|pad|>'"),
        (
            lambda t: t["added_tokens"][3].update(content="<|im_end|>"),
            "added token '<|im_end|>' is listed twice",
        ),
        (lambda t: t["model"]["vocab"].update({"<|im_end|>": 5}), "'<|im_end|>' is added token 260"),
        (lambda t: t["model"]["vocab"].update({"zz": 7}), "id 7 belongs to"),
        (lambda t: t["added_tokens"].pop(), "the chat marker '<|im_end|>' is not an added token"),
    ],
)
def test_the_check_finds_what_is_wrong_with_the_ids(source, out, change, message):
    write_tokenizer(source, out, VOCABULARY)
    broken(out, change)
    assert any(message in problem for problem in fatal(out)), fatal(out)


def test_the_check_finds_a_chat_that_does_not_come_back(source, out):
    write_tokenizer(source, out, VOCABULARY)
    broken(out, lambda t: t.update(normalizer={"type": "Lowercase"}))
    assert any("does not survive" in problem for problem in fatal(out))


def test_the_check_finds_special_tokens_and_side_files_that_disagree(source, out):
    write_tokenizer(source, out, VOCABULARY)
    write_json(out / "added_tokens.json", {"<|im_end|>": 7})
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG | {"eos_token": "</s>"})
    problems = fatal(out)
    assert "added_tokens.json: '<|im_end|>' is 7, but 260 in tokenizer.json" in problems
    assert "tokenizer_config.json: eos_token '</s>' is not in tokenizer.json" in problems


def test_a_missing_stop_token_is_reported_but_not_fatal(source, out):
    write_tokenizer(source, out, VOCABULARY)
    write_json(out / "config.json", {"eos_token_id": 257})
    messages = [str(problem) for problem in check_tokenizer(out, VOCABULARY) if not problem.fatal]
    assert any("eos_token_id is 257, without [260]: a chat turn never ends" in text for text in messages)
    assert any(text.startswith("generation_config.json: missing") for text in messages)
    assert fatal(out) == []


def test_the_end_of_a_turn_is_read_off_the_chat_template(source):
    vocabulary = read_vocabulary(json.loads((source / "tokenizer.json").read_text()), "")
    assert turn_end(source, vocabulary) == "<|im_end|>"
    plain = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    write_json(source / "tokenizer_config.json", TOKENIZER_CONFIG | {"chat_template": plain})
    assert turn_end(source, vocabulary) is None


def test_special_ids_join_config_tokenizer_and_chat_template(source):
    ids = special_ids(source)
    assert (ids.bos, ids.eos, ids.pad, ids.notes) == (257, (257, 260), 258, ())
    write_json(source / "config.json", {"eos_token_id": 260, "bos_token_id": 259, "pad_token_id": -1})
    ids = special_ids(source)
    assert (ids.bos, ids.eos, ids.pad) == (259, (260, 257), 258)


def test_an_eos_that_is_an_ordinary_token_is_left_out_and_reported(source):
    write_json(source / "config.json", {"eos_token_id": 2})
    ids = special_ids(source)
    assert ids.eos == (257, 260)
    assert ids.notes == ("config.json: eos_token_id 2 is an ordinary token of the tokenizer, left out",)


def test_the_tokenizer_of_the_small_model_passes_and_stays_exact(shared, out):
    model = shared / "models" / "tiny-dbrx"
    write_tokenizer(model, out, 4096)
    shutil.copy(model / "config.json", out / "config.json")
    assert fatal(out, 4096) == []
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert special_ids(out).eos == (4000, 4007)


def with_pad(where):
    """A [PAD] one beyond the embedding, as `where` has it."""

    def change(source):
        if where == "added_tokens.json":
            write_json(source / where, {"[PAD]": VOCABULARY})
        elif where == "tokenizer_config.json":
            decoder = {str(VOCABULARY): {"content": "[PAD]", "special": True}}
            write_json(source / where, TOKENIZER_CONFIG | {"added_tokens_decoder": decoder})
        else:
            found = json.loads((source / "tokenizer.json").read_text())
            found["added_tokens"].append({**found["added_tokens"][0], "id": VOCABULARY, "content": "[PAD]"})
            found["padding"] = {
                **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": VOCABULARY, "pad_type_id": 0, "pad_token": "[PAD]"},
            }
            if where == "the vocabulary":
                found["model"]["vocab"]["[PAD]"] = VOCABULARY
            write_json(source / "tokenizer.json", found)

    return change


@pytest.mark.parametrize(
    "where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json", "the vocabulary"]
)
def test_a_token_beyond_the_embedding_that_nothing_needs_is_left_out_with_a_note(source, out, where):
    with_pad(where)(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    write_json(source / "tokenizer_config.json", {**config, "pad_token": "[PAD]"})
    notes = write_tokenizer(source, out, VOCABULARY)
    assert "left out '[PAD]': its id 300 is beyond the embedding, which has 300 rows" in notes
    assert fatal(out) == []
    assert all("[PAD]" not in file.read_text() for file in out.iterdir())
    assert AutoTokenizer.from_pretrained(out).pad_token is None


@pytest.mark.parametrize("role", ["eos_token", "chat_template"])
def test_a_token_beyond_the_embedding_that_is_needed_is_refused(source, out, role):
    with_pad("added_tokens.json")(source)
    write_json(source / "tokenizer_config.json", TOKENIZER_CONFIG | {role: "[PAD]"})
    with pytest.raises(CheckpointError, match=r"'\[PAD\]' has id 300, the model's vocabulary has 300 rows"):
        write_tokenizer(source, out, VOCABULARY)


def test_an_id_of_a_config_beyond_the_embedding_becomes_null(source):
    write_json(source / "config.json", {"pad_token_id": VOCABULARY, "bos_token_id": 257})
    ids = special_ids(source, rows=VOCABULARY)
    assert "config.json: pad_token_id 300 is beyond the embedding, which has 300 rows, left out" in ids.notes
    config = {"pad_token_id": VOCABULARY}
    set_ids(config, SpecialIds(ids.bos, ids.eos, None, beyond=ids.beyond))
    assert config["pad_token_id"] is None


def test_the_repair_leaves_such_a_token_out_and_then_finds_nothing(source):
    with_pad("added_tokens.json")(source)
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "pad_token_id": VOCABULARY}
    write_json(source / "config.json", config)
    planned = plan_repair(source)
    assert any(change.startswith("left out '[PAD]'") for change in planned.changes)
    assert planned.remaining == ()
    apply_repair(source, planned)
    assert "[PAD]" not in json.loads((source / "added_tokens.json").read_text())
    assert check_folder(source) == []
    assert plan_repair(source).files == {}


def test_links_out_of_the_folder_are_not_read(source, out, tmp_path):
    (tmp_path / "secret").write_text("token")
    (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is a link to .*secret"):
        write_tokenizer(source, out, VOCABULARY)
