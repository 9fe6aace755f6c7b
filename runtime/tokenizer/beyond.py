"""Added tokens beyond a model's embedding, such as a [PAD] of its training, which no row belongs to."""

import json
from collections.abc import Mapping
from typing import Any


def tokens_beyond(
    tokenizer: Mapping[str, Any], declared: Mapping[str, int], rows: int, needed: Mapping[str, Any]
) -> dict[str, int]:
    """The added tokens that can be left out: token → id.

    Args:
        tokenizer: a parsed `tokenizer.json`.
        declared: tokens and ids that other files of the folder name.
        rows: of the embedding.
        needed: what cannot do without its tokens, such as the chat template and the token that ends a text;
            those that it mentions are not left out, nor those by which `tokenizer.json` frames every text.
    """
    text = json.dumps([needed, tokenizer.get("post_processor")], ensure_ascii=False)
    entries = [entry for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, Mapping)]
    found = {entry.get("content"): entry.get("id") for entry in entries} | dict(declared)
    return {
        content: number
        for content, number in found.items()
        if isinstance(content, str) and isinstance(number, int) and number >= rows
        if json.dumps(content, ensure_ascii=False)[1:-1] not in text
    }


def without(tokenizer: Mapping[str, Any], dropped: Mapping[str, int]) -> dict[str, Any]:
    """A `tokenizer.json` without some added tokens."""
    fixed = dict(tokenizer)
    entries = fixed.get("added_tokens") or []
    fixed["added_tokens"] = [entry for entry in entries if _content(entry) not in dropped]
    vocab = (fixed.get("model") or {}).get("vocab")
    if isinstance(vocab, Mapping) and any(vocab.get(content) == dropped[content] for content in dropped):
        left = {content: number for content, number in vocab.items() if dropped.get(content) != number}
        fixed["model"] = {**fixed["model"], "vocab": left}
    if (fixed.get("padding") or {}).get("pad_token") in dropped:
        fixed["padding"] = None
    return fixed


def without_roles(config: Mapping[str, Any], dropped: Mapping[str, int]) -> dict[str, Any]:
    """A `tokenizer_config.json` whose roles and lists name none of some tokens."""
    fixed = {key: value for key, value in config.items() if _content(value) not in dropped}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(fixed.get(key), list):
            fixed[key] = [value for value in fixed[key] if _content(value) not in dropped]
    decoder = fixed.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        fixed["added_tokens_decoder"] = {k: v for k, v in decoder.items() if _content(v) not in dropped}
    return fixed


def _content(value: Any) -> Any:
    """A token as files write it: its text, or an object with its text; None for anything else."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None
