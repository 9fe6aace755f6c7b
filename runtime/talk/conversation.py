"""A conversation with a chat model: its messages, the part that the model still sees, and the answers.

The keys and values of what the model has read are kept from answer to answer: a new prompt begins like the
one before it, and only what follows the common beginning is computed. Where that ends is seen by comparing
token ids, so it doesn't matter what was undone, changed, dropped or interrupted meanwhile.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from dbrx_quant.runtime.talk.text_stream import TextStream
from dbrx_quant.runtime.tokenizer.template import chat_ids

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """An answer, with its token counts and times.

    Attributes:
        text: the answer.
        tokens: how many, the one that ended the turn included.
        stopped: `turn` (the model ended it), `length`, `context` (which is full) or `interrupted`.
        prompt_tokens: what it answered to.
        reused: those of them that the model had read already.
        dropped: how many of the oldest turns it no longer saw, and the answer before still did.
        first_seconds: until the first token.
        seconds: in all.
    """

    text: str
    tokens: int
    stopped: str
    prompt_tokens: int
    reused: int
    dropped: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first, which waits for the prompt; 0 if there are none."""
        rest = self.seconds - self.first_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else 0.0


class Conversation:
    """Turns of a user and a model.

    Args:
        model: as from `load_model`; its generation config tells what ends a turn.
        tokenizer: its tokenizer, with a chat template.
        system: a system prompt, if any.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token.

    Raises:
        ValueError: the tokenizer has no chat template.

    Attributes:
        messages: what was said, `{"role": "user" | "assistant", "content": …}` in turns, no system prompt.
        context: the longest prompt and answer together, in tokens; None: the model names no limit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError("this model has no chat template: it was not trained to chat")
        self.messages: list[Message] = []
        self.system, self.max_new_tokens, self.temperature = system, max_new_tokens, temperature
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._model, self._tokenizer = model, tokenizer
        self._first = 0  # of the messages that the model still sees
        self._cache: Any = None
        self._held: list[int] = []  # the tokens whose keys and values are in it

    def ask(self, text: str, write: Callable[[str], object]) -> Answer:
        """The answer to a message, passed on to `write` while it is made.

        Ctrl-C ends the answer; what there is of it stays in the conversation.

        Raises:
            ValueError: the message alone is too long for the model; it's not kept.
        """
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()  # was interrupted before the answer began
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer(write)
        except ValueError:
            self.messages.pop()
            raise

    def retry(self, write: Callable[[str], object]) -> Answer:
        """Another answer to the last message.

        Raises:
            ValueError: there is none.
        """
        self._take_answer_back()
        return self._answer(write)

    def undo(self) -> str:
        """Remove the last message and its answer; returns the message.

        Raises:
            ValueError: there is none.
        """
        self._take_answer_back()
        self._first = 0
        return self.messages.pop()["content"]

    def reset(self, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        """Start over, or continue from other messages, which may begin with a system prompt.

        Raises:
            ValueError: they are no user's and assistant's messages in turns, an answer last; nothing changes.
        """
        offset = int(bool(messages) and messages[0].get("role") == "system")
        for index, message in enumerate(messages):
            role = ("user", "assistant")[(index - offset) % 2] if index >= offset else "system"
            if message.get("role") != role or not isinstance(message.get("content"), str):
                raise ValueError(f"message {index + 1} is not a message of the {role}: {str(message)[:60]}")
        if (len(messages) - offset) % 2:
            raise ValueError("the last message has no answer")
        if messages:
            self.system = str(messages[0]["content"]) if offset else None
        self.messages = [{"role": m["role"], "content": m["content"]} for m in messages[offset:]]
        self._first = 0

    def all_messages(self) -> list[Message]:
        """All messages, with the system prompt in front."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_ids(self._tokenizer, [*system, *messages])

    def _prompt(self) -> list[int]:
        """The ids of the prompt, with `_first` moved past the turns that don't fit.

        Raises:
            ValueError: not even the last message fits.
        """
        while True:
            ids = self._encode(self.messages[self._first :])
            if self.context is None or len(ids) + min(self.max_new_tokens, self.context // 4) <= self.context:
                return ids
            if self._first + 2 < len(self.messages):
                self._first += 2
            elif len(ids) < self.context:
                return ids
            else:
                raise ValueError(
                    f"that is {len(ids)} tokens, the model takes {self.context} with the answer; shorten it"
                )

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache back to the prefix it shares with a prompt; returns its length."""
        same = 0
        for held, token in zip(self._held, ids[:-1], strict=False):
            if held != token:
                break
            same += 1
        self._cut(same)
        return same

    def _cut(self, length: int) -> None:
        """Keep the first `length` positions, which every layer has, even if later ones are incomplete."""
        from transformers import DynamicCache

        if length == 0 or self._cache is None:
            self._cache = DynamicCache()
        else:
            for layer in self._cache.layers:
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]
        self._held = self._held[:length]

    def _take_answer_back(self) -> None:
        if not self.messages:
            raise ValueError("there is no message yet")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()

    def _answer(self, write: Callable[[str], object]) -> Answer:
        first = self._first
        ids = self._prompt()
        reused = self._reuse(ids)
        room = self.max_new_tokens if self.context is None else self.context - len(ids)
        started = time.monotonic()
        times: list[float] = []

        def passing(piece: str) -> None:
            times.append(time.monotonic())
            write(piece)

        stream = TextStream(self._tokenizer, passing)
        stopped = "length" if self.max_new_tokens <= room else "context"
        prompt = torch.tensor([ids], device=self._model.device)
        try:
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(self.max_new_tokens, room),
                streamer=stream,
                **{_cache_argument(): self._cache},
                **sampling(self.temperature),
            )
            if stream.ids[-1] in end_ids(self._model):
                stopped = "turn"
        except KeyboardInterrupt:
            stopped = "interrupted"
            stream.end()
        except BaseException:
            self._cut(0)
            raise
        # The last token was not read yet; and where a step was interrupted, some layers are ahead.
        self._held = [*ids, *stream.ids]
        self._cut(len(ids) + len(stream.ids) - 1 if stream.ids else reused)
        ended = time.monotonic()
        if stream.text or stopped != "interrupted":
            self.messages.append({"role": "assistant", "content": stream.text})
        return Answer(
            text=stream.text,
            tokens=len(stream.ids),
            stopped=stopped,
            prompt_tokens=len(ids),
            reused=reused,
            dropped=(self._first - first) // 2,
            first_seconds=(times[0] if times else ended) - started,
            seconds=ended - started,
        )


def sampling(temperature: float) -> dict[str, Any]:
    """The options of `generate` for a temperature; at 0 the model's own sampling settings are disabled."""
    if temperature:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _cache_argument() -> str:
    """What `generate` calls the cache: transformers 5.24 renamed it, and warns at the old name."""
    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    return "cache" if (major, minor) >= (5, 24) else "past_key_values"


def end_ids(model: Any) -> list[int]:
    """The ids that end a model's generation."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
