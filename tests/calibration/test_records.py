"""Files of calibration text as people have them: parquet, JSON, lines of it, packed, in all usual forms."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbrx_quant.calibration.text.sources import kind_of, read_file
from dbrx_quant.runtime.files.errors import CheckpointError

TEXTS = ["one", "two"]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
CALLS = [
    {"role": "user", "content": "Add."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "3"},
]
CALLED = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": '{"name": "f", "arguments": {"a": 1}}'},
    {"role": "tool", "content": "3"},
]
FORMS = [
    ({"messages": CHAT}, CHAT),
    ({"messages": json.dumps(CHAT)}, CHAT),
    ({"messages": [CHAT[:1], CHAT[1:]]}, CHAT),
    ({"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}}, CHAT),
    ({"messages": CALLS}, CALLED),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CHAT[1]]}, CHAT),
    ({"conversations": SHAREGPT}, CHAT),
    ({"conversation": json.dumps(SHAREGPT)}, CHAT),
    ({"prompt": "Why?", "completion": "So."}, CHAT),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
    ({"instruction": "Why?", "input": "", "output": "So."}, CHAT),
    ({"instruction": "Why?", "output": "So.", "id": 7}, CHAT),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    ({"text": "[1]"}, "[1]"),
    ({"text": ["one", ["two", None]]}, "one\ntwo"),
    ({"text": None, "content": "one"}, "one"),
    ({"messages": None, "text": "one"}, "one"),
]


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(("record", "expected"), FORMS, ids=[json.dumps(form[0])[:50] for form in FORMS])
def test_every_form_reads_alike_from_lines_from_json_and_packed(tmp_path, record, expected):
    lines = json.dumps(record) + "\n"
    files = {
        "a.jsonl": lines,
        "A.NDJSON": lines,
        "a.json": json.dumps([record]),
        "b.json": json.dumps({"data": [record]}),
        "c.json": lines + lines,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert list(read_file(tmp_path / name)) == [expected] * text.count(json.dumps(record)), name
    (tmp_path / "a.jsonl.GZ").write_bytes(gzip.compress(lines.encode()))
    assert list(read_file(tmp_path / "a.jsonl.GZ")) == [expected]


@pytest.mark.parametrize(
    ("record", "expected"), FORMS[:3] + FORMS[4:5] + FORMS[6:13], ids=lambda value: str(value)[:40]
)
def test_every_form_reads_from_parquet(tmp_path, record, expected):
    path = write_table(tmp_path / "a.PARQUET", **{name: [value] for name, value in record.items()})
    assert list(read_file(path)) == [expected]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_text_column_reads(tmp_path, kind):
    values = [text.encode() for text in TEXTS] if pa.types.is_binary(kind) else TEXTS
    assert list(read_file(write_table(tmp_path / "a.parquet", text=pa.array(values, kind)))) == TEXTS
    if "binary" not in str(kind):
        assert list(read_file(write_table(tmp_path / "b.parquet", content=pa.array(TEXTS, kind)))) == TEXTS


def test_a_column_without_any_value_gives_way_to_another(tmp_path):
    nothing = pa.array([None, None], pa.string())
    for empty in ("text", "messages"):
        path = write_table(tmp_path / "a.parquet", **{empty: nothing, "content": TEXTS})
        assert list(read_file(path)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "half \\ud83d"}', "line 1: column 'text': not Unicode at character 5"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
            "line 1: a message is not Unicode",
        ),
        ("a.json", b'[{"prompt": "\\ud83d", "completion": "x"}]', "record 1: column 'prompt': not Unicode"),
        ("a.json", b'[{"body": "a", "n": 1}]', "record 1: expected .*text.*; this one has body, n"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", b"no gzip", "not a readable .gz file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "not a readable .gz file"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "parts that are no text",
        ),
        ("a.jsonl", b'{"conversations": [{"from": "human"}]}', "a role and a content"),
    ],
)
def test_what_cannot_be_read_names_the_file_the_place_and_what_is_taken(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(read_file(tmp_path / name))
    assert name in str(caught.value)


def test_bytes_that_are_no_text_name_the_record(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=pa.array([b"fine", b"\xff"], pa.binary()))
    with pytest.raises(CheckpointError, match=r"a\.parquet, record 2: column 'text': not UTF-8 at byte 0"):
        list(read_file(path))
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    with pytest.raises(CheckpointError, match=r"b\.parquet"):
        list(read_file(write_table(tmp_path / "b.parquet", text=broken)))


def test_the_kind_of_a_file_does_not_depend_on_case_or_packing(tmp_path):
    names = {"A.TXT": ".txt", "a.Jsonl.gz": ".jsonl", "a.SAFETENSORS": ".safetensors", "a": ""}
    assert {name: kind_of(tmp_path / name) for name in names} == names
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="calibration files are"):
        read_file(tmp_path / "a.parquet.gz")
