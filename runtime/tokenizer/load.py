"""Tokenizers of model folders, always loaded locally."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.source import embedding_rows
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.regular import check_model_folder

# What decides how text becomes ids; the first name found stands for all.
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a model folder, as its own `tokenizer.json` says where there is one.

    transformers' AutoTokenizer would build some classes anew (GPT2Tokenizer, DBRX's, with GPT-2's way of
    splitting text) and ignore what the file says.

    Raises:
        CheckpointError: the folder has no tokenizer that transformers can read without running foreign code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, hence no tokenizer")
    check_model_folder(folder)
    try:
        with panics_are_errors():
            kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
            made = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            made("a")  # some fields of a wrong type are noticed only here
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise what they will on nonsense
        raise CheckpointError(
            f"{folder}: transformers cannot load a tokenizer from here: {error or repr(error)}; "
            "'dbrx-quant tokenizer' can repair some of these"
        ) from error
    return made


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Turn a panic inside the tokenizers library, which is no `Exception`, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(f"the tokenizers library gave up: {error}") from None
        raise


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Hash of the vocabulary files of a model folder: equal where text encodes to the same ids.

    Raises:
        CheckpointError: no vocabulary file that we know.
    """
    for names in _VOCABULARY_FILES:
        paths = [Path(folder) / name for name in names]
        if all(path.is_file() for path in paths):
            digest = hashlib.sha256()
            for path in paths:
                digest.update(path.read_bytes())
            return digest.hexdigest()[:32]
    known = ", ".join(" + ".join(names) for names in _VOCABULARY_FILES)
    raise CheckpointError(f"{folder}: no vocabulary file (one of {known})")


def model_limits(folder: str | Path) -> tuple[int | None, int | None]:
    """(rows of the embedding, longest sequence in tokens) of a model folder; None: not stated.

    Raises:
        CheckpointError: config.json is no JSON object.
    """
    if not (Path(folder) / "config.json").is_file():
        return None, None
    return embedding_rows(Path(folder)), longest_sequence(folder)


def longest_sequence(folder: str | Path) -> int | None:
    """Tokens of the longest sequence, by the config.json of a model folder; None: not stated.

    Raises:
        CheckpointError: config.json is missing or no JSON object.
    """
    config = read_config(Path(folder))
    longest = config.get("max_seq_len", config.get("max_position_embeddings"))
    return longest if isinstance(longest, int) else None
