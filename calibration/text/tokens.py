"""Calibration tokens: any source becomes rows of token ids and a description of where they come from."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.text.packing import pack_rows
from dbrx_quant.calibration.text.sources import NAMED, SourceUnreachable, kind_of, open_texts
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import parse_json
from dbrx_quant.runtime.tokenizer.load import load_tokenizer, model_limits, tokenizer_fingerprint

ROWS = 128
LENGTH = 2048
HELD_OUT_EVERY = 7  # one row in so many, an odd number since every second row starts with a document
_FEWEST_ROWS = 16  # with fewer, all are for calibration
_TOO_SHORT = "rows need two tokens at least, since each token is predicted from those before it"
_VERSION = "1"  # of the description in a saved file


@dataclass(frozen=True)
class TokenRows:
    """Token ids [rows, length] int64, and a JSON-ready description that a report or a job file can hold.

    Keys of the description: `source`, `seed` (None: unknown), `rows`, `length`, `tokenizer` (fingerprint),
    `content` (SHA-256 of the ids), `notices` (what was not as asked); for text also `used` (the source that
    the text came from in the end), `parts` (documents begun, tokens used), `document_starts`, `separator`.
    """

    input_ids: Tensor
    description: dict[str, Any]


def load_tokens(
    source: str | Path,
    tokenizer_folder: str | Path,
    rows: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> TokenRows:
    """Rows of token ids from a source; the same arguments give the same ids.

    Args:
        source: ready tokens (.safetensors with `input_ids` I64 [rows, length]), a .txt, .jsonl or .parquet
            file, "default" (`texts.DEFAULT_MIX`, from the Hub), "offline" (text of the Python installation),
            or a dataset `org/name[@revision][:config[:split[:column]]]`.
        tokenizer_folder: the model's folder; its config.json bounds ids and length.
        rows: number of rows; None: 128, of ready tokens all.
        length: tokens a row; None: 2048 or the model's longest sequence if that is less, of ready tokens all.
        seed: decides the order of documents.

    Returns:
        The rows. Where "default" is unavailable, "offline" is used, and where a named set has too little text
        there are fewer rows; both are said on stderr and in the description's `notices`.

    Raises:
        ValueError: an unknown source, or text too short for the rows asked for.
        CheckpointError: a file that breaks its format; ids outside the model's vocabulary.
        SourceUnreachable: a dataset that was asked for by name is unavailable.
    """
    vocabulary, longest = model_limits(tokenizer_folder)
    for name, value in (("rows", rows), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if length == 1:
        raise ValueError(f"length 1: {_TOO_SHORT}")
    if length is not None and longest is not None and length > longest:
        raise ValueError(f"length {length} is more than the {longest} tokens that the model was made for")
    if kind_of(Path(source)) == ".safetensors":
        saved = load_saved(Path(source), rows, length, vocabulary)
        if saved.input_ids.shape[1] < 2:
            raise ValueError(f"{source}: its rows have one token: {_TOO_SHORT}")
        described = dict(saved.description)
        made_with = described.get("tokenizer")
        if made_with is not None and made_with != tokenizer_fingerprint(tokenizer_folder):
            _notice(described, f"{source} was made with another tokenizer than that of {tokenizer_folder}")
        return TokenRows(saved.input_ids, described)
    found = _from_text(source, tokenizer_folder, rows or ROWS, length or min(LENGTH, longest or LENGTH), seed)
    _check_ids(found.input_ids, vocabulary, source)
    return found


def split_held_out(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration rows, and held-out rows (maybe none): nothing is chosen on these, they show the cost."""
    rows = torch.arange(len(input_ids))
    held_out = (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) & (len(rows) >= _FEWEST_ROWS)
    return input_ids[~held_out], input_ids[held_out]


def save_tokens(path: str | Path, tokens: TokenRows) -> None:
    """Write tokens.safetensors: `input_ids` I64 [rows, length], description as metadata, values in JSON."""
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in tokens.description.items()}
    save_tensors(path, {"input_ids": tokens.input_ids}, {**metadata, "format_version": _VERSION})


def load_saved(
    path: Path, rows: int | None = None, length: int | None = None, vocabulary: int | None = None
) -> TokenRows:
    """Ready tokens as they are, or their first `rows` rows and `length` columns.

    Raises:
        ValueError: there is no such file, or fewer rows or columns in it than asked for.
        CheckpointError: no `input_ids` I64 [rows, length], or an id outside 0 … vocabulary - 1.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file of ready tokens")
    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            metadata = opened.metadata() or {}
            ids = opened.get_tensor("input_ids") if "input_ids" in names else None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if ids is None:
        raise CheckpointError(f"{path}: no tensor input_ids, only {', '.join(names) or 'none at all'}")
    if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.numel():
        raise CheckpointError(
            f"{path}: input_ids must be I64 [rows, length], got {ids.dtype} {list(ids.shape)}"
        )
    for axis, name, requested in ((0, "rows", rows), (1, "length", length)):
        if requested is not None and requested > ids.shape[axis]:
            raise ValueError(f"{path}: {name} {requested} asked for, but the file has {ids.shape[axis]}")
    ids = ids[:rows, :length].contiguous()
    _check_ids(ids, vocabulary, path)
    description = _saved_description(path, metadata)
    description.setdefault("seed", None)
    description.setdefault("notices", [])
    if "source" in description:
        description["made_from"] = description["source"]
    return TokenRows(ids, {**description, "source": str(path), **_facts(ids)})


def reopen_tokens(path: Path) -> TokenRows:
    """What `save_tokens` wrote, with the description that it had then: not a source, but work to resume.

    Raises:
        CheckpointError: as in `load_saved`.
    """
    from safetensors import safe_open

    saved = load_saved(path)
    with safe_open(path, "pt") as opened:
        return TokenRows(saved.input_ids, _saved_description(path, opened.metadata() or {}))


def _from_text(
    source: str | Path, tokenizer_folder: str | Path, rows: int, length: int, seed: int
) -> TokenRows:
    tokenizer = load_tokenizer(tokenizer_folder)
    description: dict[str, Any] = {"source": str(source), "used": str(source), "seed": seed, "notices": []}
    try:
        texts = open_texts(source, seed)
        packed = pack_rows(texts.parts, tokenizer, rows, length)
    except SourceUnreachable as error:
        if source != "default":
            raise SourceUnreachable(f"{error}; 'offline' or a local file needs no network") from error
        _notice(description, f"{error}; calibrating on text of the Python installation ('offline') instead")
        description["used"] = "offline"
        texts = open_texts("offline", seed)
        packed = pack_rows(texts.parts, tokenizer, rows, length)
    for notice in packed.notices:
        _notice(description, notice)
    possible = packed.input_ids.shape[0]
    if possible < rows:
        short = f"{source}: {rows} rows of {length} tokens asked for, but the text gives {possible} rows"
        short += f" and {packed.leftover} tokens"
        if possible == 0 or description["used"] not in NAMED:
            raise ValueError(f"{short}; ask for fewer or shorter rows, or give more text")
        _notice(description, short)
    description |= {
        "tokenizer": tokenizer_fingerprint(tokenizer_folder),
        "parts": packed.counts,
        "document_starts": packed.document_starts,
        "separator": tokenizer.eos_token_id,
        **texts.details,
    }
    return TokenRows(packed.input_ids, {**description, **_facts(packed.input_ids)})


def _facts(ids: Tensor) -> dict[str, Any]:
    content = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    return {"rows": ids.shape[0], "length": ids.shape[1], "content": content}


def _check_ids(ids: Tensor, vocabulary: int | None, source: str | Path) -> None:
    wrong = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else ids[ids < 0]
    if wrong.numel():
        bound = "" if vocabulary is None else f"; the vocabulary ends at {vocabulary - 1}"
        raise CheckpointError(
            f"{source}: id {int(wrong[0])} is outside the vocabulary{bound}: made with another tokenizer?"
        )


def _saved_description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Our own metadata; a file from elsewhere has none that we can read, and needs none."""
    version = metadata.get("format_version")
    if version is None:
        return {}
    if version != _VERSION:
        raise CheckpointError(f"{path}: token file of version {version}, this program reads {_VERSION}")
    try:
        return {key: parse_json(text) for key, text in metadata.items() if key != "format_version"}
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata is not JSON: {error}") from error


def _notice(description: dict[str, Any], text: str) -> None:
    """Print a notice now and keep it for the report."""
    description["notices"] = [*description["notices"], text]
    print(f"notice: {text}", file=sys.stderr)
