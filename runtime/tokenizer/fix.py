"""The tokenizer files of a quantized checkpoint: complete, with exact ids, and agreeing with each other.

What is fixed, and why:

* Holes in the id range get placeholders. The tokenizers library gives added tokens the next free id whatever
  `tokenizer.json` declares, so DBRX's unused id 100256 would move <|endoftext|> and every token behind it.
* Added tokens beyond the embedding are left out if nothing needs them: no row belongs to a padding token that
  somebody added for a training.
* Tokens that only `added_tokens.json` or `added_tokens_decoder` know go into `tokenizer.json`, where else the
  chat markers are cut into ordinary pieces.
* `tokenizer_class` becomes `PreTrainedTokenizerFast` where another class would load something else than
  `tokenizer.json` says: transformers 5 rebuilds a `GPT2Tokenizer` (its choice for DBRX) with GPT-2's own
  splitting rule, older versions don't know `TokenizersBackend`, and remote code is not carried over.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.atomic import write_json, write_text
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.links import refuse_links_out
from dbrx_quant.runtime.tokenizer.beyond import tokens_beyond, without, without_roles
from dbrx_quant.runtime.tokenizer.check import Problem, check_tokenizer
from dbrx_quant.runtime.tokenizer.ids import (
    Vocabulary,
    added_token,
    chat_template,
    read_object,
    read_vocabulary,
    special_token,
)
from dbrx_quant.runtime.tokenizer.tiktoken_source import (
    ENCODING,
    convert_tiktoken,
    is_wrapper,
    wrapped_template,
    wraps_tiktoken,
)

__all__ = ["TOKENIZER_FILES", "Problem", "check_tokenizer", "fix_tokenizer", "write_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_OTHER_SOURCES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# All of a model folder, besides its weights, that the files of a quantized one are made of.
READ_FILES = (
    *("config.json", "generation_config.json", "merges.txt", "vocab.bpe", "tiktoken.model"),
    *(f"{ENCODING}.tiktoken", *TOKENIZER_FILES, *_OTHER_SOURCES),
)
_MOST_HOLES = 100_000
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_REBUILT_CLASSES = ("GPT2Tokenizer", "TokenizersBackend")


def write_tokenizer(source: Path, out: Path, vocab_size: int) -> list[str]:
    """Write the tokenizer files of `source` to `out`, fixed, and return what was changed, a sentence each.

    Args:
        source: the original checkpoint's folder.
        out: the quantized checkpoint's folder; it exists.
        vocab_size: rows of the embedding, the limit of every id.

    Raises:
        CheckpointError: there is no usable tokenizer, a file is damaged, two files give one token different
            ids, the id of a token that is needed lies outside the embedding, or a file is a link that leads
            out of the folder.
    """
    refuse_links_out(source / name for name in (*READ_FILES, *(p.name for p in source.glob("*.tiktoken"))))
    config = read_object(source / "tokenizer_config.json")
    declared = _declared_tokens(source, config)
    template = chat_template(source)
    text, notes = _tokenizer_text(source, declared)
    tokenizer = json.loads(text)
    needed = {role: special_token(source, role) for role in ("bos", "eos", "unk")} | {"template": template}
    dropped = tokens_beyond(tokenizer, declared, vocab_size, needed)
    if dropped:
        tokenizer, config = without(tokenizer, dropped), without_roles(config, dropped)
        declared = {content: number for content, number in declared.items() if content not in dropped}
        notes += [
            f"left out {content!r}: its id {number} is beyond the embedding, which has {vocab_size} rows"
            for content, number in dropped.items()
        ]
    fixed, changes = fix_tokenizer(tokenizer, declared, vocab_size, str(source))
    notes += changes
    vocabulary = read_vocabulary(fixed, str(source / "tokenizer.json"))
    if changes or dropped:
        text = json.dumps(fixed, ensure_ascii=False, indent=1) + "\n"

    if template is None and not (source / "tokenizer.json").is_file():
        template = wrapped_template(source, vocabulary.added)
        if template is not None:
            notes.append("took ChatML's template, which the wrapper has in its code, without a system prompt")
    config, changes = _fixed_config(config, fixed, template)
    notes += changes
    write_text(out / "tokenizer.json", text)
    write_json(out / "tokenizer_config.json", config)
    write_json(out / "special_tokens_map.json", _special_tokens_map(source, config, vocabulary, dropped))
    extra = {c: i for c, i in vocabulary.added.items() if c not in vocabulary.base}
    if extra or dropped:
        write_json(out / "added_tokens.json", extra)
    else:
        (out / "added_tokens.json").unlink(missing_ok=True)
    if template is not None:
        write_text(out / "chat_template.jinja", template)
    else:
        (out / "chat_template.jinja").unlink(missing_ok=True)
    return notes


def fix_tokenizer(
    tokenizer: Mapping[str, Any], declared: Mapping[str, int], vocab_size: int, where: str
) -> tuple[dict[str, Any], list[str]]:
    """A `tokenizer.json` whose tokens get exactly the declared ids, and what was changed.

    Args:
        tokenizer: the parsed file; it's left as it is.
        declared: tokens and ids that other files of the folder name.
        vocab_size: the limit of every id.
        where: the folder, for messages.

    Raises:
        CheckpointError: a token has two ids, an id two tokens, or an id is not below `vocab_size`.
    """
    vocabulary = read_vocabulary(tokenizer, f"{where}/tokenizer.json")
    fixed = dict(tokenizer)
    base = dict(vocabulary.base)
    entries = [dict(entry) for entry in tokenizer.get("added_tokens") or []]
    added = dict(vocabulary.added)
    changes = []

    owners = {number: content for content, number in (*base.items(), *added.items())}
    for content, number in declared.items():
        known = vocabulary.id_of(content)
        if known is None and number not in owners:
            entries.append(added_token(number, content))
            added[content], owners[number] = number, content
            changes.append(f"added {content!r} as token {number}, which tokenizer.json did not have")
        elif known != number:
            taken = f"is token {known}" if known is not None else f"would take the id of {owners[number]!r}"
            raise CheckpointError(
                f"{where}/tokenizer.json: {content!r} {taken}, another file in the folder says {number}; "
                "the files belong to different models"
            )

    for content, number in (*base.items(), *added.items()):
        if number >= vocab_size:
            raise CheckpointError(
                f"{where}/tokenizer.json: {content!r} has id {number}, the model's vocabulary has "
                f"{vocab_size} rows; the tokenizer belongs to another model"
            )
    first_added = 1 + max(base.values(), default=-1)
    runs = Vocabulary(base, added).holes()
    count = sum(run.stop - run.start for run in runs)
    if count > _MOST_HOLES:
        raise CheckpointError(
            f"{where}/tokenizer.json: {count} ids have no token, at most {_MOST_HOLES} are filled; "
            "the tokenizer belongs to another model"
        )
    holes = [number for run in runs for number in run]
    for number in holes:
        content = f"<|reserved_{number}|>"
        if content in base or content in added:
            raise CheckpointError(
                f"{where}/tokenizer.json: no token has id {number} and {content!r} is another's"
            )
        entries.append(added_token(number, content))
        if number < first_added:  # a hole inside the model's own vocabulary shifts all that is added
            base[content] = number
    if holes:
        text = ", ".join(map(str, holes[:6])) + (" …" if len(holes) > 6 else "")
        changes.append(f"filled {len(holes)} unused id{'s' * (len(holes) > 1)} with placeholders: {text}")
        if len(base) > len(vocabulary.base):
            fixed["model"] = {**tokenizer["model"], "vocab": base}
    by_id = sorted(entries, key=lambda entry: entry["id"])
    if changes or by_id != entries:  # ids are handed out in file order
        fixed["added_tokens"] = by_id
        changes = changes or ["sorted the added tokens by id"]

    result = read_vocabulary(fixed, f"{where}/tokenizer.json")
    seen: dict[int, str] = {}
    for content, number in (*result.base.items(), *result.added.items()):
        if seen.setdefault(number, content) != content:
            raise CheckpointError(
                f"{where}/tokenizer.json: {seen[number]!r} and {content!r} both have id {number}"
            )
        if result.id_of(content) != number:
            raise CheckpointError(
                f"{where}/tokenizer.json: {content!r} has the ids {number} and {result.id_of(content)}"
            )
    return fixed, changes


def _tokenizer_text(source: Path, declared: Mapping[str, int]) -> tuple[str, list[str]]:
    """The content of the source's `tokenizer.json`, converted from other files where it has none."""
    path = source / "tokenizer.json"
    if path.is_file():
        read_object(path)  # refuses a damaged file by name
        return path.read_text(encoding="utf-8"), []
    present = [name for name in _OTHER_SOURCES if (source / name).is_file()]
    if not present and wraps_tiktoken(source):
        converted, notes = convert_tiktoken(source, declared)
        return json.dumps(converted, ensure_ascii=False, indent=1) + "\n", notes
    if not present:
        found = sorted(p.name for p in source.glob("*tok*")) + sorted(
            p.name for p in source.glob("*.tiktoken")
        )
        raise CheckpointError(
            f"{source}: no tokenizer.json and nothing to make it from"
            + (f" (found {', '.join(dict.fromkeys(found))})" if found else "")
            + "; put the tokenizer.json of the model's current release there"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True, trust_remote_code=False)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    except Exception as error:  # whatever the many converters raise, the way out is the same
        raise CheckpointError(
            f"{source}: no tokenizer.json, and transformers cannot make one from {', '.join(present)}: "
            f"{error}; put the tokenizer.json of the model's current release there"
        ) from error
    return text, [f"made tokenizer.json from {', '.join(present)}"]


def _declared_tokens(source: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of `added_tokens.json` and of `added_tokens_decoder` in `tokenizer_config.json`."""
    declared = dict(read_object(source / "added_tokens.json"))
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        content = str(entry["content"]) if isinstance(entry, Mapping) else str(entry)
        if declared.setdefault(content, int(number)) != int(number):
            raise CheckpointError(
                f"{source}/added_tokens.json: {content!r} is {declared[content]}, "
                f"tokenizer_config.json says {number}"
            )
    return declared


def _fixed_config(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], template: str | None
) -> tuple[dict[str, Any], list[str]]:
    """`tokenizer_config.json` that loads `tokenizer.json` as it is, and what was changed."""
    fixed = dict(config)
    changes = []
    original = fixed.get("tokenizer_class")
    remote = fixed.pop("auto_map", None) is not None
    rebuilt = str(original).removesuffix("Fast") in _REBUILT_CLASSES
    if remote or rebuilt or original is None or is_wrapper(str(original)):
        fixed["tokenizer_class"] = _GENERIC_CLASS
        if original != _GENERIC_CLASS:
            changes.append(f"set tokenizer_class to {_GENERIC_CLASS} (was {original})")
    for key in ("backend", "is_local", "local_files_only", "name_or_path"):
        fixed.pop(key, None)  # traces of the process that saved it
    if fixed.get("added_tokens_decoder"):
        fixed["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in tokenizer.get("added_tokens") or []
        }
    # Readers older than chat_template.jinja look here; where both exist, both say the same.
    if template is not None and not isinstance(fixed.get("chat_template"), list):
        fixed["chat_template"] = template
    return fixed, changes


def _special_tokens_map(
    source: Path, config: Mapping[str, Any], vocabulary: Vocabulary, dropped: Mapping[str, int]
) -> dict[str, str | list[str]]:
    """Role → token; under `additional_special_tokens` those special tokens that have no role of their own."""
    roles = {f"{role}_token": special_token(source, role) for role in ("bos", "eos", "pad", "unk")}
    named: dict[str, str | list[str]] = {
        role: token for role, token in roles.items() if token and token not in dropped
    }
    given = read_object(source / "special_tokens_map.json").get("additional_special_tokens")
    given = given or config.get("additional_special_tokens") or []
    extra = [str(token["content"]) if isinstance(token, Mapping) else str(token) for token in given]
    known = [token for token in extra if vocabulary.id_of(token) is not None]
    if known:
        named["additional_special_tokens"] = known
    return named
