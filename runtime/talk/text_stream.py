"""The text of new tokens as they are generated, in whole characters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class TextStream:
    """A streamer for `generate`: passes text on as soon as its characters are complete.

    A character may be spread over several tokens, and a token may hold parts of two. What is passed on is,
    put together, exactly what the tokenizer makes of all the new tokens at once, without special tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        write: called with each piece of text.

    Attributes:
        ids: the new tokens.
        text: their text as far as it was passed on.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        from tokenizers.decoders import DecodeStream

        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._decoding = DecodeStream([], skip_special_tokens=True)
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token after another."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for number in value.reshape(-1).tolist():
            self.ids.append(number)
            piece = self._decoding.step(self._tokenizer._tokenizer, number)
            if piece:
                self._pass_on(piece)

    def end(self) -> None:
        """Pass on the rest: a character that was never completed."""
        whole = self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(whole) > len(self.text):
            self._pass_on(whole[len(self.text) :])

    def _pass_on(self, piece: str) -> None:
        self.text += piece
        self._write(piece)
