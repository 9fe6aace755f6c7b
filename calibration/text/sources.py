"""Where calibration text comes from: local files, our named sets, datasets on the Hub.

A source becomes `Texts`: parts with a share of the tokens each, and documents in seeded order. A document is
a string, or a conversation (list of messages) that the tokenizer's chat template will render.
"""

import gzip
import json
import platform
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.text import offline
from dbrx_quant.calibration.text.records import ACCEPTED, Document, document_of, form_among, of_any_form
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.output.redact import redact_message

NAMED = ("default", "offline")
FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet")
_LINES = (".jsonl", ".ndjson")
_PACKED = ".gz"

# The default set: educational web prose, Python sources, chat turns; (part, share of the tokens, dataset).
DEFAULT_MIX = (
    ("prose", 0.5, "HuggingFaceFW/fineweb-edu:sample-10BT:train:text"),
    ("code", 0.25, "codeparrot/codeparrot-clean-valid::train:content"),
    ("chat", 0.25, "HuggingFaceH4/ultrachat_200k::train_sft:messages"),
)

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
        source: "default", "offline", a .txt, .jsonl, .json or .parquet file, or a dataset on the Hub,
            `org/name[@revision][:config[:split[:column]]]`.
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
    if isinstance(source, Path) or kind_of(path) in FILE_TYPES or text.count("/") != 1 or text[0] in "./~":
        raise ValueError(
            f"calibration source {text!r}: no such file; a source is one of {', '.join(NAMED)}, a file"
            f" ({' '.join(FILE_TYPES)} or tokens .safetensors), or org/name[:config[:split[:column]]]"
        )
    documents, details = _open_dataset(text, seed)
    return Texts((Part("text", 1.0, documents),), {"dataset": details})


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, whatever its case; that of a packed one is within the name."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == _PACKED else suffix


def read_file(path: Path) -> Iterator[Document]:
    """Documents of a local file, in its order.

    A .txt is cut at form feeds or lines `<|endoftext|>`; without any, into passages of whole paragraphs of at
    least 16,000 characters. A line of a .jsonl, an item of a .json and a record of a .parquet is a document,
    in one of the forms of `records`; of a .parquet without any of them it is all strings, joined by line
    feeds. All but a .parquet may be packed as .gz.

    Raises:
        ValueError: the kind of file is not known.
        CheckpointError: broken contents, with the place.
    """
    kind = kind_of(path)
    if kind == ".txt":
        return _read_text(path)
    if kind in _LINES:
        return _read_lines(path)
    if kind == ".json":
        return _read_json(path)
    if kind == ".parquet" and path.suffix.lower() != _PACKED:
        return _read_parquet(path)
    raise ValueError(
        f"{path}: calibration files are {', '.join(FILE_TYPES)} or tokens .safetensors; all but .parquet and "
        "tokens also as .gz"
    )


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


def _read_lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: not JSON: {error}") from error
        document = _of_json(record, where)
        if document is not None:
            yield document


def _read_json(path: Path) -> Iterator[Document]:
    """A list of records, one alone, an object that holds such a list, or lines in spite of the name."""
    text = _decoded(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        if getattr(error, "msg", "") != "Extra data":
            raise CheckpointError(f"{path}: not JSON: {error}") from error
        yield from _read_lines(path)
        return
    except RecursionError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if isinstance(content, dict) and not of_any_form(content):
        content = next((value for value in content.values() if isinstance(value, list)), content)
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        document = _of_json(record, f"{path}, record {number}")
        if document is not None:
            yield document


def _of_json(record: Any, where: str) -> Document | None:
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: expected a JSON object with {ACCEPTED}; got {str(record)[:80]}")
    form = form_among([name for name, value in record.items() if value is not None])
    if form is None and isinstance(record.get("content"), str):
        form = ("content",)
    if form is None and not of_any_form(record):
        raise CheckpointError(
            f"{where}: expected a JSON object with {ACCEPTED}; this one has {', '.join(record) or 'nothing'}"
        )
    return document_of({name: record[name] for name in form}, None, where) if form else None


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped] # it has no types
    import pyarrow.parquet  # type: ignore[import-untyped] # likewise

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(file)
            if not columns:
                names = ", ".join(file.schema_arrow.names) or "(none)"
                raise CheckpointError(
                    f"{path}: no column of text or messages among {names}; taken are {ACCEPTED}"
                )
            records = (record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist())
            for number, record in enumerate(records, 1):
                document = document_of(record, None, f"{path}, record {number}")
                if document is not None:
                    yield document
    except CheckpointError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable parquet file: {error}") from error


def _columns(file: Any) -> list[str]:
    """The columns of a parquet file that hold the documents, those without any value left aside."""
    from pyarrow import types

    def plain(kind: Any) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind))

    def textual(kind: Any) -> bool:
        if types.is_dictionary(kind):
            return textual(kind.value_type)
        return plain(kind) or bool(types.is_string_view(kind))

    schema = file.schema_arrow
    filled = [
        name
        for name in schema.names
        if not of_any_form([name])
        or any(batch.column(0).null_count < len(batch) for batch in file.iter_batches(columns=[name]))
    ]
    form = form_among(filled)
    if form:
        return list(form)
    fields = [field for field in schema if field.name in filled]
    strings = [field.name for field in fields if plain(field.type)]
    return strings or [field.name for field in fields if textual(field.type)]


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == _PACKED:
            content = gzip.decompress(content)
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CheckpointError(f"{path}: not a readable .gz file: {error}") from error


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
        reason = " ".join(redact_message(str(error)).split())[:200] or type(error).__name__
        raise SourceUnreachable(f"dataset {name} is unavailable: {reason}") from error
    finally:
        config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL = known
