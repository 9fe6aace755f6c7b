"""Sources of calibration text, packing into rows, saved tokens."""

import itertools
import json
import os
import random
import subprocess
import sys
import time

import pytest
import safetensors.torch
import small_hub
import torch
from byte_tokenizer import write_tokenizer

from dbrx_quant.calibration.text import offline, packing, sources
from dbrx_quant.calibration.text import tokens as text_tokens
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def offline_description(model):
    return text_tokens.load_tokens("offline", model, 4, 64, 5).description


@pytest.fixture
def decode(model):
    return load_tokenizer(model).decode


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(path, count=40, size=57):
    """Documents that start with `^`, of different sizes, each of one letter."""
    return jsonl(path, ({"text": "^" + chr(97 + i % 26) * (size + 7 * i)} for i in range(count)))


# --- packing


def test_rows_use_every_token_once_and_every_second_begins_a_document(tmp_path, model, decode):
    source = numbered(tmp_path / "a.jsonl")
    lengths = [58 + 7 * i + 1 for i in range(40)]  # with the separator
    possible = sum(lengths) // 64
    tokens = text_tokens.load_tokens(source, model, possible, 64, seed=3)
    assert tokens.input_ids.shape == (possible, 64)
    assert tokens.input_ids.dtype == torch.int64
    begins = [decode(row[:1]) == "^" for row in tokens.input_ids]
    early = possible // 2  # later on there are no fresh documents left
    assert all(begins[0:early:2])
    assert tokens.description["document_starts"] == sum(begins)
    text = decode(tokens.input_ids.flatten()).replace("<|endoftext|>", "")
    assert text.count("^") == 40
    whole = "".join(json.loads(line)["text"] for line in source.read_text().splitlines())
    for letter in map(chr, range(97, 123)):
        assert whole.count(letter) - 63 <= text.count(letter) <= whole.count(letter)
    with pytest.raises(
        ValueError, match=rf"{possible + 1} rows of 64 .* gives {possible} rows and \d+ tokens"
    ):
        text_tokens.load_tokens(source, model, possible + 1, 64, seed=3)


def test_a_row_continues_the_document_that_an_earlier_row_began(tmp_path, model, decode):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "".join(map(chr, range(33, 113)))}])
    rows = text_tokens.load_tokens(source, model, 2, 40).input_ids
    assert decode(rows.flatten()) == "".join(map(chr, range(33, 113)))


def test_documents_end_with_the_separator(tmp_path, model, decode):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "aaa"}, {"text": "aaa"}])
    assert (
        decode(text_tokens.load_tokens(source, model, 1, 8).input_ids[0])
        == "aaa<|endoftext|>aaa<|endoftext|>"
    )


def test_the_seed_decides_the_ids(tmp_path, model):
    source = numbered(tmp_path / "a.jsonl")
    first, again, other = (
        text_tokens.load_tokens(source, model, 8, 64, seed).input_ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_get_their_shares_of_the_tokens(model):
    sizes = random.Random(5)
    parts = [
        sources.Part(name, share, (letter * sizes.randrange(1, 900) for _ in itertools.count()))
        for name, share, letter in (("x", 0.5, "x"), ("y", 0.3, "y"), ("z", 0.2, "z"))
    ]
    packed = packing.pack_rows(parts, load_tokenizer(model), 50, 128)
    for part in parts:
        assert abs(packed.counts[part.name]["tokens"] / (50 * 128) - part.share) < 128 / 6400
    dry = [sources.Part("dry", 0.9, iter(["a" * 20])), sources.Part("wet", 0.1, iter(["b" * 999]))]
    packed = packing.pack_rows(dry, load_tokenizer(model), 10, 100)
    assert packed.input_ids.shape == (10, 100)
    assert packed.counts["dry"] == {"documents": 1, "tokens": 21}


def test_bos_comes_as_the_tokenizer_says(tmp_path):
    folder = write_tokenizer(tmp_path / "m", bos=True)
    source = jsonl(tmp_path / "a.jsonl", [{"text": "a" * 30}, {"text": "a" * 30}])
    ids = text_tokens.load_tokens(source, folder, 2, 20).input_ids
    assert ids[0, 0] == 1  # BOS begins a document …
    assert ids[1, 0] != 1  # … and not the row that continues it
    assert (ids == 1).sum() == 2


def test_conversations_go_through_the_chat_template(tmp_path, model, decode):
    turns = [{"role": "user", "content": "Why?", "id": 7}, {"role": "assistant", "content": "So."}]
    source = jsonl(tmp_path / "a.jsonl", [{"messages": turns, "text": None}])
    expected = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|endoftext|>"
    ids = text_tokens.load_tokens(source, model, 1, 29).input_ids[0]
    assert decode(ids) == expected
    assert ids[0] == 1  # a special token, not its characters

    plain = write_tokenizer(tmp_path / "plain", template=False, eos=False)
    tokens = text_tokens.load_tokens(source, plain, 1, 24)
    assert decode(tokens.input_ids[0]) == "User: Why?\n\nAssistant: S"
    assert any("no chat template" in notice for notice in tokens.description["notices"])
    assert any("no end-of-text" in notice for notice in tokens.description["notices"])


# --- files


def test_plain_text_is_cut_at_separators_or_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n\n<|endoftext|>\nthree")
    assert [text.strip() for text in sources.read_file(path)] == ["one", "two\nlines", "three"]
    path.write_text("one\ftwo")
    assert list(sources.read_file(path)) == ["one", "two"]
    paragraphs = [f"{i}" * 5000 for i in range(10)]
    path.write_text("\n \n".join(paragraphs))
    passages = list(sources.read_file(path))
    assert len(passages) == 3
    assert "".join(passages) == "\n \n".join(paragraphs)


def test_parquet_gives_messages_text_or_all_strings(tmp_path):
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "Hi"}]
    path = tmp_path / "a.parquet"
    for columns, expected in (
        ({"text": ["a", None, " "], "other": ["b", "c", "d"]}, ["a"]),
        ({"messages": [turns], "text": ["x"]}, [turns]),
        ({"question": ["q", "r"], "n": [1, 2], "answer": ["a", None]}, ["q\na", "r"]),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        assert list(sources.read_file(path)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1: expected a JSON object with messages or text"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "neither text nor messages, but int"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a role and a content"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', "a role and a content"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "not a readable safetensors file"),
    ],
)
def test_broken_files_are_refused_with_the_place(tmp_path, model, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        text_tokens.load_tokens(tmp_path / name, model, 1, 4)
    assert name in str(caught.value)


def test_parquet_without_text_is_refused(tmp_path, model):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CheckpointError, match="no column of text or messages among n"):
        text_tokens.load_tokens(tmp_path / "a.parquet", model, 1, 4)


def test_unknown_sources_and_bad_sizes_are_the_callers_mistake(tmp_path, model):
    for source in (
        "nonsense",
        "./a/b",
        "missing.jsonl",
        tmp_path / "missing",
        "missing.safetensors",
        "a/b:1:2:3:4",
    ):
        with pytest.raises(ValueError, match=r"no such file|expected org/name"):
            text_tokens.load_tokens(source, model, 1, 4)
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"calibration files are \.txt"):
        text_tokens.load_tokens(tmp_path / "a.pdf", model, 1, 4)
    with pytest.raises(ValueError, match="length 1: rows need two tokens at least"):
        text_tokens.load_tokens("offline", model, 4, 1)
    safetensors.torch.save_file(
        {"input_ids": torch.zeros(4, 1, dtype=torch.int64)}, tmp_path / "1.safetensors"
    )
    with pytest.raises(ValueError, match="rows have one token"):
        text_tokens.load_tokens(tmp_path / "1.safetensors", model)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        text_tokens.load_tokens("offline", model, 0, 4)
    with pytest.raises(ValueError, match="more than the 4096 tokens"):
        text_tokens.load_tokens("offline", model, 1, 4097)
    with pytest.raises(CheckpointError, match="no such folder"):
        text_tokens.load_tokens("offline", tmp_path / "nowhere", 1, 4)


# --- ready tokens


def test_saved_tokens_read_back_with_their_description(tmp_path, model, capsys):
    made = text_tokens.load_tokens(numbered(tmp_path / "a.jsonl"), model, 8, 64, seed=9)
    path = tmp_path / "tokens.safetensors"
    text_tokens.save_tokens(path, made)
    read = text_tokens.load_saved(path)
    assert torch.equal(read.input_ids, made.input_ids)
    changed = {"source": str(path), "made_from": made.description["source"]}
    assert read.description == {**made.description, **changed}
    cut = text_tokens.load_tokens(path, model, rows=3, length=10, seed=1)
    assert torch.equal(cut.input_ids, made.input_ids[:3, :10])
    assert (cut.description["rows"], cut.description["length"], cut.description["seed"]) == (3, 10, 9)
    assert cut.description["content"] != made.description["content"]
    assert cut.description["notices"] == []
    other = write_tokenizer(tmp_path / "other", bos=True)
    assert "made with another tokenizer" in text_tokens.load_tokens(path, other).description["notices"][0]
    assert "made with another tokenizer" in capsys.readouterr().err
    for asked in ({"rows": 9}, {"length": 65}):
        with pytest.raises(ValueError, match=r"asked for, but the file has"):
            text_tokens.load_tokens(path, model, **asked)


def test_ready_tokens_of_other_makers_are_taken_as_they_are(tmp_path, model):
    path = tmp_path / "tokens.safetensors"
    ids = torch.arange(24).view(4, 6)
    safetensors.torch.save_file({"input_ids": ids}, path)
    tokens = text_tokens.load_tokens(path, model)
    assert torch.equal(tokens.input_ids, ids)
    assert tokens.description["seed"] is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"input_ids": torch.tensor([[5, 300]])},
            "id 300 is outside the vocabulary; the vocabulary ends at 299",
        ),
        ({"input_ids": torch.tensor([[5, -1]])}, "id -1 is outside"),
        ({"input_ids": torch.tensor([[5, 3]], dtype=torch.int32)}, "must be I64"),
        ({"input_ids": torch.tensor([5, 3])}, "must be I64"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "must be I64"),
        ({"ids": torch.tensor([[5]])}, "no tensor input_ids, only ids"),
    ],
)
def test_ready_tokens_are_checked(tmp_path, model, tensors, message):
    path = tmp_path / "tokens.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        text_tokens.load_tokens(path, model)


def test_descriptions_of_another_version_are_refused(tmp_path, model):
    path = tmp_path / "tokens.safetensors"
    for metadata, message in (
        ({"format_version": "99"}, "version 99"),
        ({"format_version": "1", "a": "{"}, "JSON"),
    ):
        safetensors.torch.save_file({"input_ids": torch.zeros(1, 1, dtype=torch.int64)}, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            text_tokens.load_tokens(path, model)


# --- named sets and the Hub


def test_offline_text_is_plenty_and_the_same_every_time():
    # 128k tokens of 4 characters, which is what a big vocabulary makes of English and code
    seen = list(itertools.islice(offline.documents(), 400))
    assert sum(map(len, seen)) > 2 * 128 * 1024 * 4
    assert seen[:20] == list(itertools.islice(offline.documents(), 20))
    assert len(set(seen)) == len(seen)
    kinds = [list(kind) for kind in (offline.prose(), offline.code(), offline.conversations())]
    assert all(len(kind) > 100 for kind in kinds)
    assert all([turn["role"] for turn in chat] == ["user", "assistant"] * 2 for chat in kinds[2])


def test_offline_does_not_depend_on_hash_seed_or_process(model, offline_description):
    code = (
        "import sys; from dbrx_quant.calibration.text.tokens import load_tokens;"
        "print(load_tokens('offline', sys.argv[1], 4, 64, 5).description['content'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(model)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == offline_description["content"]


def test_offline_gives_fewer_rows_with_a_notice_when_text_runs_out(model, monkeypatch, capsys):
    for name in ("prose", "code", "conversations"):
        monkeypatch.setattr(offline, name, lambda: iter(["a" * 99]))
    tokens = text_tokens.load_tokens("offline", model, 10, 100)
    assert tokens.input_ids.shape == (3, 100)
    assert "10 rows of 100 tokens asked for, but the text gives 3" in tokens.description["notices"][0]
    assert "gives 3 rows" in capsys.readouterr().err


def test_default_falls_back_to_offline_and_says_so_when_the_hub_is_away(model, offline_description):
    code = (
        "import json, sys; from dbrx_quant.calibration.text.tokens import load_tokens\n"
        "print(json.dumps(load_tokens('default', sys.argv[1], 4, 64, 5).description))\n"
        "try: load_tokens('org/name', sys.argv[1], 4, 64, 5)\n"
        "except RuntimeError as error: print(error)"
    )
    before = time.monotonic()
    command = [sys.executable, "-c", code, str(model)]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - before < 60
    described, refused = done.stdout.splitlines()
    assert_fell_back(json.loads(described), offline_description, done.stderr)
    assert "dataset org/name is unavailable" in refused
    assert "'offline' or a local file" in refused


def test_default_falls_back_to_offline_at_once_in_offline_mode(
    model, offline_description, monkeypatch, capsys
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the environment variable sets
    described = text_tokens.load_tokens("default", model, 4, 64, 5).description
    assert_fell_back(described, offline_description, capsys.readouterr().err)
    assert "offline mode" in described["notices"][0]


def assert_fell_back(described, plain, printed):
    assert (described["source"], described["used"]) == ("default", "offline")
    assert described["content"] == plain["content"]
    assert len(described["notices"]) == 1
    assert "HuggingFaceFW/fineweb-edu is unavailable" in described["notices"][0]
    assert f"notice: {described['notices'][0]}" in printed


def test_datasets_are_streamed_from_the_hub_by_config_split_and_column(tmp_path, model):
    def lines(record):
        return b"".join(json.dumps(record(i)).encode() + b"\n" for i in range(60))

    def card(config, split, pattern):
        data_files = f"  - split: {split}\n    path: {pattern}\n"
        return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{data_files}---\n".encode()

    def turns(i):
        return [{"role": "user", "content": f"?{i}"}, {"role": "assistant", "content": "!" * 50}]

    repositories = {
        "HuggingFaceFW/fineweb-edu": {
            "README.md": card("sample-10BT", "train", "sample/10BT/*.jsonl"),
            "sample/10BT/000.jsonl": lines(lambda i: {"text": f"p{i} " * 30, "url": "u"}),
            "sample/100BT/000.jsonl": lines(lambda i: {"text": "wrong"}),
        },
        "codeparrot/codeparrot-clean-valid": {
            "data.jsonl": lines(lambda i: {"repo": "r", "content": f"c{i} " * 30})
        },
        "HuggingFaceH4/ultrachat_200k": {
            "README.md": card("default", "train_sft", "data/sft*"),
            "data/sft-0.jsonl": lines(lambda i: {"prompt": "wrong", "messages": turns(i)}),
        },
        "org/gone": {"data.jsonl": None},
    }
    code = (
        "import sys; from dbrx_quant.calibration.text.tokens import load_tokens, save_tokens\n"
        "for i, seed in enumerate((1, 1, 2)):\n"
        "    tokens = load_tokens('default', sys.argv[1], 20, 100, seed)\n"
        "    save_tokens(f'{sys.argv[2]}/{i}.safetensors', tokens)\n"
        "for source in ('org/gone', 'org/missing', 'HuggingFaceH4/ultrachat_200k::test',\n"
        "        'codeparrot/codeparrot-clean-valid::train:body'):\n"
        "    try: load_tokens(source, sys.argv[1], 4, 64, 5)\n"
        "    except (RuntimeError, ValueError) as error: print(type(error).__name__, error)"
    )
    with small_hub.serve(repositories) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", code, str(model), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again, other = (text_tokens.load_saved(tmp_path / f"{i}.safetensors") for i in range(3))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.description["used"] == "default"
    assert first.description["notices"] == []
    used = {name: part["tokens"] / 2000 for name, part in first.description["parts"].items()}
    assert used == pytest.approx({"prose": 0.5, "code": 0.25, "chat": 0.25}, abs=0.05)
    assert first.description["datasets"]["prose"]["revision"] == small_hub.REVISION
    text = load_tokenizer(model).decode(first.input_ids.flatten())
    assert "wrong" not in text
    assert "<|im_start|>user\n?" in text
    gone, missing, split, column = done.stdout.splitlines()
    assert gone.startswith("SourceUnreachable dataset org/gone is unavailable")
    assert missing.startswith("SourceUnreachable dataset org/missing is unavailable: 404")
    assert split == "ValueError dataset HuggingFaceH4/ultrachat_200k: choose a split among train_sft"
    assert column.startswith("CheckpointError dataset codeparrot/codeparrot-clean-valid, record 0: no column")


@pytest.mark.parametrize("rows", [1, 8, 15, 16, 32, 128])
def test_held_out_rows_are_spread_over_starts_of_documents_and_others(rows):
    ids = torch.arange(rows)[:, None].expand(rows, 3)
    seen, held_out = text_tokens.split_held_out(ids)
    assert sorted(seen[:, 0].tolist() + held_out[:, 0].tolist()) == list(range(rows))
    assert seen[:, 0].tolist() == sorted(seen[:, 0].tolist())
    if rows < 16:
        assert not len(held_out)
    else:
        assert rows / 8 <= len(held_out) <= rows / 6
        assert {0, 1} == {row % 2 for row in held_out[:, 0].tolist()}
