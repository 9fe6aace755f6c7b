"""Which token has which id in a checkpoint folder, and which ids begin, pad and end a text.

`tokenizer.json` is the one truth about ids; `tokenizer_config.json`, `special_tokens_map.json`, `config.json`
and `generation_config.json` only say which tokens play a part. For chat models the token that ends a turn is
found by rendering the chat template, because nothing else reveals it: DBRX's config names no eos at all, its
tokenizer names <|endoftext|>, and chat turns end with <|im_end|>. A checkpoint that passes this on as it is
never stops talking.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import load_json
from dbrx_quant.runtime.tokenizer.template import TemplateError, render

PROBE_ANSWER = "pong"
PROBE_CHAT = ({"role": "user", "content": "ping"}, {"role": "assistant", "content": PROBE_ANSWER})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a `tokenizer.json`.

    Attributes:
        base: content → id of the model's own vocabulary.
        added: content → declared id of the added tokens, in file order.
        special: the added tokens that are marked special: never part of a text itself.
    """

    base: Mapping[str, int]
    added: Mapping[str, int]
    special: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return 1 + max((*self.base.values(), *self.added.values()), default=-1)

    def id_of(self, content: str) -> int | None:
        """The id of a token, added tokens first as tokenizers does, or None."""
        return self.added.get(content, self.base.get(content))

    def holes(self) -> list[range]:
        """The runs of ids below `size` that no token has, in order."""
        taken = sorted({-1, *self.base.values(), *self.added.values()})
        return [range(a + 1, b) for a, b in itertools.pairwise(taken) if b - a > 1]


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a special role.

    Attributes:
        bos: begins a text, or None.
        eos: end a text or a chat turn, in order of authority; empty where nothing tells.
        pad: pads a batch, or None.
        notes: what was left out, a sentence each: an impossible id, a template that does not render.
        beyond: keys of configs that name an id beyond the embedding.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    notes: tuple[str, ...] = field(default=())
    beyond: frozenset[str] = frozenset()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an absent file reads as an empty one.

    Raises:
        CheckpointError: the file is no JSON, or holds something else than an object.
    """
    if not path.is_file():
        return {}
    try:
        value = load_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_vocabulary(tokenizer: Mapping[str, Any], file: str) -> Vocabulary:
    """The tokens of a parsed `tokenizer.json`.

    Args:
        tokenizer: its content.
        file: where it came from, for messages.

    Raises:
        CheckpointError: the file lacks the parts of the tokenizers format, or two added tokens have one name.
    """
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: [piece, score] pairs, the place is the id
        base = {str(entry[0]): index for index, entry in enumerate(vocab)}
    elif isinstance(vocab, Mapping):
        base = dict(vocab)
    else:
        raise CheckpointError(f"{file}: no model.vocab; expected the format of the tokenizers library")
    added: dict[str, int] = {}
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: added_tokens is not a list")
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{file}: added_tokens has an entry without content: {entry!r}")
        if entry["content"] in added:
            raise CheckpointError(f"{file}: added token {entry['content']!r} is listed twice")
        added[entry["content"]] = entry.get("id")  # type: ignore[assignment]  # checked below
    for content, number in (*base.items(), *added.items()):
        if not isinstance(number, int) or number < 0:
            raise CheckpointError(f"{file}: token {content!r} has id {number!r}; expected an integer from 0")
    special = frozenset(entry["content"] for entry in entries if entry.get("special"))
    return Vocabulary(base, added, special)


def added_token(number: int, content: str) -> dict[str, Any]:
    """A special token, found in a text exactly as written: an entry of `added_tokens` in `tokenizer.json`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def special_token(folder: Path, role: str) -> str | None:
    """The content of the token that the tokenizer's side files give the role `bos`, `eos`, `pad` or `unk`."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_object(folder / file).get(f"{role}_token")
        if isinstance(value, Mapping):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def template_file(folder: Path) -> Path:
    """The file with the folder's chat template, if any; `chat_template.jinja` wins, as in transformers."""
    file = folder / "chat_template.jinja"
    return file if file.is_file() else folder / "tokenizer_config.json"


def chat_template(folder: Path) -> str | None:
    """The folder's default chat template.

    Raises:
        CheckpointError: a file is damaged.
    """
    file = template_file(folder)
    if file.suffix == ".jinja":
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 text ({error}); the file is damaged") from None
    value = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # named templates
        named = [e for e in value if isinstance(e, Mapping) and e.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None


def render_chat(folder: Path, messages: list[dict[str, str]], generation_prompt: bool = False) -> str | None:
    """The text of a conversation under the folder's chat template, or None where there is no template.

    Raises:
        CheckpointError: the template cannot be rendered.
    """
    template = chat_template(folder)
    if template is None:
        return None
    roles = {f"{role}_token": special_token(folder, role) for role in ("bos", "eos", "pad", "unk")}
    tokens = {role: content for role, content in roles.items() if content is not None}
    try:
        return render(template, messages, add_generation_prompt=generation_prompt, **tokens)
    except TemplateError as error:
        file = template_file(folder)
        raise CheckpointError(f"{file}: the chat template cannot be rendered: {error}") from None


def turn_end(folder: Path, vocabulary: Vocabulary) -> str | None:
    """The added token that the chat template puts after an assistant's message, or None.

    Raises:
        CheckpointError: as in `render_chat`.
    """
    rendered = render_chat(folder, [dict(message) for message in PROBE_CHAT])
    if rendered is None or PROBE_ANSWER not in rendered:
        return None
    tail = rendered[rendered.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :]
    found = [(tail.index(content), -len(content), content) for content in vocabulary.added if content in tail]
    return min(found)[2] if found else None


def config_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(file, key, id) of every bos, eos and pad id in `config.json` and `generation_config.json`."""
    for file in ("config.json", "generation_config.json"):
        config = read_object(folder / file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = config.get(key)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield file, key, number


def special_ids(folder: Path, configs: Path | None = None, rows: int | None = None) -> SpecialIds:
    """The bos, eos and pad ids according to all files of a folder.

    A config's own word comes first, then the tokenizer's; for eos all of them count, and the token that ends
    a chat turn. An eos in a config is kept only if it's an added token or named by the tokenizer's side
    files: old configs carry the default of another model's config class, there an ordinary piece of text.

    Args:
        folder: where the tokenizer's files are.
        configs: where `config.json` and `generation_config.json` are, if elsewhere.
        rows: of the embedding; ids beyond it that a config names are left out. None: they stay.

    Raises:
        CheckpointError: `tokenizer.json` is absent or a file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    vocabulary = read_vocabulary(read_object(path), str(path))
    named = {role: special_token(folder, role) for role in ("bos", "eos", "pad", "unk")}
    ids = {role: vocabulary.id_of(content) for role, content in named.items() if content is not None}
    stops = {*vocabulary.added.values(), *(number for number in ids.values() if number is not None)}

    said: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": [], "pad_token_id": []}
    notes = []
    beyond = set()
    for file, key, number in config_ids(configs or folder):
        if key == "pad_token_id" and number < 0:
            continue  # some Llama configs say -1 for "none"
        if rows is not None and number >= rows:
            beyond.add(key)
            notes.append(f"{file}: {key} {number} is beyond the embedding, which has {rows} rows, left out")
        elif key == "eos_token_id" and number not in stops:
            notes.append(f"{file}: {key} {number} is an ordinary token of the tokenizer, left out")
        else:
            said[key].append(number)
    try:
        end = turn_end(folder, vocabulary)
    except CheckpointError as error:
        end = None
        notes.append(f"{error}; the token that ends a chat turn is not known")
    eos = [*said["eos_token_id"], ids.get("eos"), vocabulary.added[end] if end else None]
    return SpecialIds(
        bos=next(iter((*said["bos_token_id"], ids.get("bos"))), None),
        eos=tuple(dict.fromkeys(number for number in eos if number is not None)),
        pad=next(iter((*said["pad_token_id"], ids.get("pad"))), None),
        notes=tuple(dict.fromkeys(notes)),
        beyond=frozenset(beyond),
    )


def set_ids(config: dict[str, Any], ids: SpecialIds) -> None:
    """Fill in the ids that are known; a single eos stays a number, as most readers write it.

    One that was left out because it lies beyond the embedding becomes null.
    """
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos)
    for key, value in (("bos_token_id", ids.bos), ("eos_token_id", eos), ("pad_token_id", ids.pad)):
        if value is not None and value != []:
            config[key] = value
        elif key in ids.beyond and key in config:
            config[key] = None
