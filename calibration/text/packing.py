"""Rows of token ids out of documents: mixed by share, separated, every second row at a document's start.

Rows are filled alternately from a fresh document and from what earlier rows left over of theirs, so that half
of the rows begin where a text begins and half in the middle of one, and no token is thrown away.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.calibration.text.offline import plain_conversation
from dbrx_quant.calibration.text.records import Document
from dbrx_quant.calibration.text.sources import Part


@dataclass(frozen=True)
class Packed:
    """Rows [rows, length] int64, and how they came about."""

    input_ids: Tensor
    document_starts: int  # rows that begin with a document's first token
    counts: dict[str, dict[str, int]]  # part → documents begun, tokens used
    leftover: int  # tokens at the end that fill no row
    notices: tuple[str, ...]


@dataclass
class _Supply:
    """What is left of one part."""

    part: Part
    left: deque[list[int]] = field(default_factory=deque)  # rests of documents that earlier rows began
    documents: int = 0
    tokens: int = 0
    dry: bool = False  # no fresh document any more

    def take(self, fresh: bool, encode: "Encoder") -> tuple[list[int], bool] | None:
        """Ids of a document (True) or of the rest of one (False), of the requested kind if there is one."""
        if not fresh and self.left:
            return self.left.popleft(), False
        while not self.dry:
            document = next(self.part.documents, None)
            self.dry = document is None
            if document is not None and (ids := encode(document)):
                self.documents += 1
                return ids, True
        return (self.left.popleft(), False) if self.left else None


class Encoder:
    """Documents to ids as the tokenizer says: its BOS rule, its chat template; the end marker behind each."""

    def __init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer and look up its end-of-text id (None: documents follow without a separator)."""
        self.tokenizer = tokenizer
        self.separator: int | None = tokenizer.eos_token_id
        self.plain_chats = False  # conversations came, and there was no template for them

    def __call__(self, document: Document) -> list[int]:
        """Ids of one document and the separator; empty for a document without tokens."""
        if isinstance(document, str):
            text, special = document, True
        elif self.tokenizer.chat_template:
            text, special = self._rendered(document), False  # the template writes BOS itself
        else:
            self.plain_chats = True
            text, special = plain_conversation(document), True
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if self.separator is not None and ids and ids[-1] != self.separator:
            ids.append(self.separator)
        return ids

    def _rendered(self, document: Sequence[dict[str, str]]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(document, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in document)
            raise ValueError(
                f"the chat template refuses a conversation with the roles {roles}: {error}"
            ) from error


def pack_rows(parts: Sequence[Part], tokenizer: Any, rows: int, length: int) -> Packed:
    """Up to `rows` rows of `length` ids each; fewer when the text ends.

    Args:
        parts: documents with their shares of the tokens; a part that runs dry is made up for by the others.
        tokenizer: of transformers.
        rows: at least 1.
        length: tokens a row, at least 1.
    """
    encode = Encoder(tokenizer)
    supplies = [_Supply(part) for part in parts]
    filled: list[list[int]] = []
    starts = leftover = 0
    while len(filled) < rows:
        row: list[int] = []
        fresh = len(filled) % 2 == 0
        begins = False
        for supply, ids, first in _draw(supplies, fresh, encode):
            begins = first if not row else begins
            used = min(len(ids), length - len(row))
            row += ids[:used]
            supply.tokens += used
            if used < len(ids):
                supply.left.append(ids[used:])
            if len(row) == length:
                break
        else:
            leftover = len(row)
            break
        filled.append(row)
        starts += begins
    notices = []
    if encode.plain_chats:
        notices.append("the tokenizer has no chat template: conversations are rendered as plain text")
    if encode.separator is None:
        notices.append(
            "the tokenizer has no end-of-text token: documents follow each other without a separator"
        )
    return Packed(
        torch.tensor(filled, dtype=torch.int64).reshape(len(filled), length),
        starts,
        {supply.part.name: {"documents": supply.documents, "tokens": supply.tokens} for supply in supplies},
        leftover,
        tuple(notices),
    )


def _draw(
    supplies: Sequence[_Supply], fresh: bool, encode: Encoder
) -> Iterator[tuple[_Supply, list[int], bool]]:
    """Pieces of text, each from the part that is furthest behind its share at that moment."""
    while True:
        for supply in sorted(supplies, key=lambda supply: supply.tokens / supply.part.share):
            piece = supply.take(fresh, encode)
            if piece is not None:
                yield supply, *piece
                break
        else:
            return
