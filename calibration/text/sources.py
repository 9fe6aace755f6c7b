"""Where calibration text comes from: local files, our named sets, datasets on the Hub.

A source becomes `Texts`: parts with a share of the tokens each, and documents in seeded order. A document is
a string, or a conversation (list of messages) that the tokenizer's chat template will render.
"""

import json
import platform
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.text import offline
from dbrx_quant.calibration.text.offline import Conversation
from dbrx_quant.runtime.files.errors import CheckpointError

Document = str | Conversation

NAMED = ("default", "offline")
FILE_TYPES = (".txt", ".jsonl", ".parquet")

# The default set: educational web prose, Python sources, chat turns; (part, share of the tokens, dataset).
DEFAULT_MIX = (
    ("prose", 0.5, "HuggingFaceFW/fineweb-edu:sample-10BT:train:text"),
    ("code", 0.25, "codeparrot/codeparrot-clean-valid::train:content"),
    ("chat", 0.25, "HuggingFaceH4/ultrachat_200k::train_sft:messages"),
)

_FIELDS = ("messages", "text")  # of a record, the first one that is there
_SEPARATOR = re.compile(r"\f|^[ \t]*<\|endoftext\|>[ \t\r]*$\n?", re.MULTILINE)  # of documents in a .txt file
_PASSAGE = 16_000  # characters after which a .txt without separators is cut at the next blank line
_SHUFFLE_BUFFER = 1_000  # documents of a streamed dataset that are shuffled together, beside its shards
_TIMEOUT_S = 10.0
# Names of libraries whose exceptions mean that a remote dataset is unavailable.
_NETWORK_LIBRARIES = frozenset(
    {
        "aiohttp",
        "datasets",
        "fsspec",
        "httpcore",
        "httpcore2",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "requests",
    }
)


class SourceUnreachable(RuntimeError):
    """A remote dataset is unavailable: no network, no such dataset, no permission."""


@dataclass(frozen=True)
class Part:
    """Documents of one kind, in the order in which they are to be used."""

    name: str
    share: float  # of the tokens, relative to the other parts
    documents: Iterator[Document]


@dataclass(frozen=True)
class Texts:
    """What a source holds; `details` tells in a report where exactly it comes from."""

    parts: tuple[Part, ...]
    details: dict[str, Any] = field(default_factory=dict)


def open_texts(source: str | Path, seed: int) -> Texts:
    """Documents of a source in seeded order.

    Args:
        source: "default", "offline", a .txt, .jsonl or .parquet file, or `org/name[@revision][:config[:split
            [:column]]]` on the Hub.
        seed: decides the order of the documents; the same seed and the same source give the same order.

    Raises:
        ValueError: the source is none of these.
        CheckpointError: a file cannot be read as what its name says.
        SourceUnreachable: the dataset is unavailable, also later, while documents are drawn.
    """
    path = Path(source)
    if path.is_file():
        return Texts((Part("text", 1.0, iter(_shuffled(read_file(path), f"{seed}:text"))),))
    if source == "offline":
        kinds: dict[str, Iterable[Document]] = {
            "prose": offline.prose(),
            "code": offline.code(),
            "chat": offline.conversations(),
        }
        return Texts(
            tuple(
                Part(name, offline.SHARES[name], iter(_shuffled(kinds[name], f"{seed}:{name}")))
                for name in kinds
            ),
            {"python": platform.python_version()},
        )
    if source == "default":
        opened = {name: _open_dataset(dataset, seed, ours=True) for name, _, dataset in DEFAULT_MIX}
        return Texts(
            tuple(Part(name, share, opened[name][0]) for name, share, _ in DEFAULT_MIX),
            {"datasets": {name: details for name, (_, details) in opened.items()}},
        )
    text = str(source)
    if isinstance(source, Path) or path.suffix in FILE_TYPES or text.count("/") != 1 or text[0] in "./~":
        raise ValueError(
            f"calibration source {text!r}: no such file; a source is one of {', '.join(NAMED)}, a file"
            f" ({' '.join(FILE_TYPES)} or tokens .safetensors), or org/name[:config[:split[:column]]]"
        )
    documents, details = _open_dataset(text, seed)
    return Texts((Part("text", 1.0, documents),), {"dataset": details})


def read_file(path: Path) -> Iterator[Document]:
    """Documents of a local file, in its order.

    A .txt is cut at form feeds or lines `<|endoftext|>`; without any, into passages of whole paragraphs of at
    least 16,000 characters. A line of a .jsonl and a record of a .parquet is a document: the column
    `messages` (role and content each), else `text`, else (.parquet) all strings, joined by line feeds.

    Raises:
        ValueError: the kind of file is not known.
        CheckpointError: broken contents, with the place.
    """
    if path.suffix == ".txt":
        return _read_text(path)
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise ValueError(f"{path}: calibration files are {', '.join(FILE_TYPES)} or tokens .safetensors")


def document_of(record: Mapping[str, Any], column: str | None, where: str) -> Document | None:
    """The document that a record holds (None: an empty one).

    Raises:
        CheckpointError: no such column, or its value is neither text nor messages.
    """
    if column is None:
        column = next((name for name in _FIELDS if record.get(name) is not None), None)
    if column is None:
        texts = [value for value in record.values() if isinstance(value, str) and value.strip()]
        if not texts and not any(value is None or isinstance(value, str) for value in record.values()):
            raise CheckpointError(f"{where}: neither messages nor text in columns {', '.join(record)}")
        return "\n".join(texts) or None
    if column not in record:
        raise CheckpointError(f"{where}: no column {column!r}, only {', '.join(record) or '(none)'}")
    value = record[column]
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if not isinstance(value, list):
        raise CheckpointError(
            f"{where}: column {column!r} is neither text nor messages, but {type(value).__name__}"
        )
    turns: Conversation = []
    for turn in value:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise CheckpointError(
                f"{where}: a message needs a role and a content, both text; got {str(turn)[:80]}"
            )
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns or None


def _shuffled(documents: Iterable[Document], seed: str) -> list[Document]:
    listed = list(documents)
    random.Random(seed).shuffle(listed)  # a string seeds through SHA-512: the same in every process
    return listed


def _read_text(path: Path) -> Iterator[Document]:
    text = _decoded(path)
    documents = _SEPARATOR.split(text)
    for document in documents if len(documents) > 1 else _passages(text):
        if document.strip():
            yield document


def _passages(text: str) -> Iterator[str]:
    start = 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.end() - start >= _PASSAGE:
            yield text[start : blank.end()]
            start = blank.end()
    yield text[start:]


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: not JSON: {error}") from error
        fields = {key: record[key] for key in _FIELDS if key in record} if isinstance(record, dict) else {}
        if not fields:
            raise CheckpointError(f"{where}: expected a JSON object with messages or text, got {line[:80]}")
        document = document_of(fields, None, where)
        if document is not None:
            yield document


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped] # it has no types
    import pyarrow.parquet  # type: ignore[import-untyped] # likewise

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        types = pyarrow.types
        strings = [
            entry.name for entry in schema if types.is_string(entry.type) or types.is_large_string(entry.type)
        ]
        columns = next(([name] for name in _FIELDS if name in schema.names), strings)
        if not columns:
            raise CheckpointError(f"{path}: no column of text or messages among {', '.join(schema.names)}")
        records = (record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist())
        for number, record in enumerate(records, 1):
            document = document_of(record, None, f"{path}, record {number}")
            if document is not None:
                yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: not a readable parquet file: {error}") from error


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error


def _open_dataset(name: str, seed: int, *, ours: bool = False) -> tuple[Iterator[Document], dict[str, Any]]:
    """Documents of a dataset on the Hub as a seeded stream, and what identifies them for fetching them again.

    `ours`: the caller has not chosen this dataset, so that anything wrong with it makes it unreachable.
    """
    repository, *rest = name.split(":")
    repository, _, revision = repository.partition("@")
    if len(rest) > 3 or not all(repository.partition("/")):
        raise ValueError(f"dataset {name!r}: expected org/name[@revision][:config[:split[:column]]]")
    config, split, column = ([*rest, "", "", ""])[:3]
    with _patience(repository, ours):
        import datasets
        from huggingface_hub import HfApi

        # The first request finds out fast whether the Hub answers, and pins the revision for all others.
        pinned = HfApi().dataset_info(repository, revision=revision or None, timeout=_TIMEOUT_S).sha
        splits = datasets.load_dataset(repository, config or None, revision=pinned, streaming=True)
        split = split or ("train" if "train" in splits else "")
        if split not in splits:
            raise ValueError(f"dataset {repository}: choose a split among {', '.join(map(str, splits))}")
        stream = splits[split].shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    details = {"name": repository, "revision": pinned, "config": config, "split": split, "column": column}
    return _drawn(stream, repository, column or None, ours), details


def _drawn(
    stream: Iterable[Mapping[str, Any]], name: str, column: str | None, ours: bool
) -> Iterator[Document]:
    records = enumerate(stream)
    while True:
        with _patience(name, ours):
            number, record = next(records, (-1, {}))
            document = (
                document_of(record, column, f"dataset {name}, record {number}") if number >= 0 else None
            )
        if number < 0:
            return
        if document is not None:
            yield document


@contextmanager
def _patience(name: str, ours: bool) -> Iterator[None]:
    """Retry for seconds, not minutes, and turn whatever fails then into SourceUnreachable."""
    from datasets import config

    known = config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL
    config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL = 3, 2
    try:
        yield
    except Exception as error:
        remote = type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES
        if not (remote or isinstance(error, OSError) or (ours and isinstance(error, ValueError))):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceUnreachable(f"dataset {name} is unavailable: {reason}") from error
    finally:
        config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL = known
