"""Whether the tokenizer files of a checkpoint folder agree with the model and with each other."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.ids import (
    Vocabulary,
    config_ids,
    read_object,
    read_vocabulary,
    render_chat,
    special_ids,
    special_token,
    template_file,
    turn_end,
)
from dbrx_quant.runtime.tokenizer.load import panics_are_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHAT = [
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "It's 42 (forty-two).\nNaïve café?"},
    {"role": "user", "content": "Thanks!"},
]


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of the folder.

    Attributes:
        file: its name.
        message: what is wrong, and the way out if there is one.
        fatal: whether text goes wrong for every reader; otherwise some readers fill the gap.
    """

    file: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def check_tokenizer(folder: Path, vocab_size: int) -> list[Problem]:
    """Everything wrong with the tokenizer files of `folder`; empty if all is well.

    Ids: none outside the embedding, none twice, each token exactly where `tokenizer.json` says, which the
    tokenizers library does not grant: it ignores the declared ids of added tokens and hands out the next free
    one, so that a hole in the range (100256 in DBRX's) shifts every token behind it. The side files must
    agree, special tokens must exist, a rendered chat must come back from its ids, with each marker as one id.

    Args:
        folder: the checkpoint folder; `config.json` and `generation_config.json` are looked at where present.
        vocab_size: rows of the embedding.
    """
    try:
        return _problems(folder, vocab_size)
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # fields of unexpected types
        return [Problem("tokenizer.json", f"a field of it or of the files beside it is wrong: {error!r}")]


def _problems(folder: Path, vocab_size: int) -> list[Problem]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [
            Problem(
                "tokenizer.json", "missing; 'dbrx-quant tokenizer' creates it from other files where possible"
            )
        ]
    problems: list[Problem] = []
    try:
        parsed = read_object(path)
        vocabulary = read_vocabulary(parsed, "tokenizer.json")
        for file in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
            read_object(folder / file)
    except CheckpointError as error:
        return [Problem("tokenizer.json", str(error))]
    problems += _check_ids(vocabulary, vocab_size)
    problems += _check_side_files(folder, vocabulary)
    problems += _check_class(folder, parsed)

    from tokenizers import Tokenizer

    try:
        with panics_are_errors():
            tokenizer = Tokenizer.from_file(str(path))
            problems += _check_effective_ids(tokenizer, vocabulary)
            problems += _check_chat(folder, tokenizer, vocabulary)
    except CheckpointError as error:
        return [*problems, Problem("tokenizer.json", str(error))]
    except Exception as error:  # the library raises the bare class
        return [*problems, Problem("tokenizer.json", f"the tokenizers library rejects it: {error}")]
    try:
        problems += _check_configs(folder, vocabulary, vocab_size)
    except CheckpointError as error:
        problems.append(Problem("config.json", str(error)))
    return problems


def _check_ids(vocabulary: Vocabulary, vocab_size: int) -> list[Problem]:
    problems = []
    outside = {c: i for c, i in {**vocabulary.base, **vocabulary.added}.items() if i >= vocab_size}
    for content, number in sorted(outside.items(), key=lambda item: item[1])[:8]:
        problems.append(
            Problem("tokenizer.json", f"{content!r} has id {number}, the embedding has {vocab_size} rows")
        )
    if len(outside) > 8:
        problems.append(Problem("tokenizer.json", f"{len(outside) - 8} more ids outside the embedding"))
    for content, number in vocabulary.added.items():
        if vocabulary.base.get(content, number) != number:
            problems.append(
                Problem(
                    "tokenizer.json",
                    f"{content!r} is added token {number} and vocabulary entry {vocabulary.base[content]}",
                )
            )
    tokens = {(content, number) for content, number in (*vocabulary.base.items(), *vocabulary.added.items())}
    counts = Counter(number for _, number in tokens)
    for number in sorted(number for number, count in counts.items() if count > 1)[:8]:
        names = sorted(content for content, other in tokens if other == number)
        problems.append(Problem("tokenizer.json", f"id {number} belongs to {', '.join(map(repr, names))}"))
    holes = [] if outside else vocabulary.holes()
    if holes:
        count = sum(hole.stop - hole.start for hole in holes)
        shown = itertools.islice(itertools.chain.from_iterable(holes), 8)
        text = ", ".join(map(str, shown)) + (f" and {count - 8} more" if count > 8 else "")
        problems.append(Problem("tokenizer.json", f"no token has id {text}; fill the holes", fatal=False))
    return problems


def _check_effective_ids(tokenizer: "Tokenizer", vocabulary: Vocabulary) -> list[Problem]:
    problems = []
    for content, number in vocabulary.added.items():
        effective = tokenizer.token_to_id(content)
        if effective != number:
            problems.append(
                Problem(
                    "tokenizer.json",
                    f"{content!r} is declared as {number} but becomes {effective} when loaded; "
                    "fill the holes in the id range",
                )
            )
    return problems


def _check_side_files(folder: Path, vocabulary: Vocabulary) -> list[Problem]:
    problems = []
    declared = [
        ("added_tokens.json", content, number)
        for content, number in read_object(folder / "added_tokens.json").items()
    ]
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        return [Problem("tokenizer_config.json", "added_tokens_decoder is not an object")]
    for number, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else entry
        declared.append(("tokenizer_config.json", str(content), int(number) if number.isdigit() else number))
    for file, content, number in declared:
        known = vocabulary.id_of(content)
        if known != number:
            problems.append(Problem(file, f"{content!r} is {number}, but {known} in tokenizer.json"))
    for role in ("bos", "eos", "pad", "unk"):
        named = special_token(folder, role)
        if named is not None and vocabulary.id_of(named) is None:
            problems.append(
                Problem("tokenizer_config.json", f"{role}_token {named!r} is not in tokenizer.json")
            )
    return problems


def _check_class(folder: Path, tokenizer: dict[str, Any]) -> list[Problem]:
    """Whether transformers' AutoTokenizer loads anything other than what `tokenizer.json` says."""
    config = read_object(folder / "tokenizer_config.json")
    mapped = config.get("auto_map")
    if isinstance(mapped, dict) and "AutoTokenizer" in mapped:
        message = "auto_map asks for remote code, which loads another tokenizer than tokenizer.json"
        return [Problem("tokenizer_config.json", message, fatal=False)]
    splitter = tokenizer.get("pre_tokenizer")
    plain = (
        isinstance(splitter, dict) and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    )
    if str(config.get("tokenizer_class")).removesuffix("Fast") == "GPT2Tokenizer" and not plain:
        message = (
            f"tokenizer_class is {config['tokenizer_class']}: transformers 5 then splits text as GPT-2 does, "
            "not as tokenizer.json says"
        )
        return [Problem("tokenizer_config.json", message, fatal=False)]
    return []


def _check_chat(folder: Path, tokenizer: "Tokenizer", vocabulary: Vocabulary) -> list[Problem]:
    """Faults in encoding a rendered chat and decoding it again."""
    file = template_file(folder).name
    try:
        text = render_chat(folder, _CHAT, generation_prompt=True)
    except CheckpointError as error:
        return [Problem(file, str(error), fatal=False)]
    if text is None:
        return []
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    problems = []
    for content in sorted(vocabulary.special):
        number = vocabulary.added[content]
        expected, found = text.count(content), ids.count(number)
        nested = any(other != content and content in other for other in vocabulary.added)
        if expected != found and not nested:
            problems.append(
                Problem(file, f"a chat has {content!r} {expected} times, its ids have {number} {found} times")
            )
    if "<|im_start|>" in text:
        for marker in ("<|im_start|>", "<|im_end|>"):
            if marker in text and marker not in vocabulary.added:
                pieces = len(tokenizer.encode(marker, add_special_tokens=False).ids)
                problems.append(
                    Problem(
                        file,
                        f"the chat marker {marker!r} is not an added token; it is split into {pieces} ids",
                    )
                )
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(back, text, strict=False)) if a != b),
                min(len(back), len(text)),
            )
            problems.append(
                Problem(
                    file,
                    f"a ChatML conversation does not survive encoding and decoding: at character {at} "
                    f"{text[at : at + 16]!r} became {back[at : at + 16]!r}",
                )
            )
    return problems


def _check_configs(folder: Path, vocabulary: Vocabulary, vocab_size: int) -> list[Problem]:
    problems = []
    for file, key, number in config_ids(folder):
        if number >= vocab_size or (number < 0 and key != "pad_token_id"):
            problems.append(
                Problem(file, f"{key} {number} is outside the embedding, which has {vocab_size} rows")
            )
    special = special_ids(folder)
    problems += [Problem("config.json", note, fatal=False) for note in special.notes]
    for file in ("config.json", "generation_config.json"):
        if not (folder / file).is_file():
            if file == "generation_config.json":
                problems.append(Problem(file, "missing; generate() then uses config.json alone", fatal=False))
            continue
        value = read_object(folder / file).get("eos_token_id")
        eos = value if isinstance(value, list) else [] if value is None else [value]
        missing = [number for number in special.eos if number not in eos]
        if missing:
            why = "a chat turn never ends" if _ends_turn(folder, vocabulary, missing) else "a text never ends"
            problems.append(
                Problem(
                    file, f"eos_token_id is {value}, without {missing}: {why} for readers of this file", False
                )
            )
    return problems


def _ends_turn(folder: Path, vocabulary: Vocabulary, ids: list[int]) -> bool:
    try:
        end = turn_end(folder, vocabulary)
    except CheckpointError:
        return False
    return end is not None and vocabulary.id_of(end) in ids
