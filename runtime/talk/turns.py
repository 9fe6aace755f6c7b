"""Turns at the model: one request generates, the others wait, and each can be stopped at every token.

A `Turn` is what transformers' handlers of the server call a generation manager. It stops when its client has
left, when its time is over or when the server closes: between tokens, and between layers while a long prompt
is read.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.utils import DirectStreamer, _StreamError

from dbrx_quant.runtime.talk.calls import CallParser
from dbrx_quant.runtime.talk.door import Visit
from dbrx_quant.runtime.talk.requests import Asked

FAILED = "the server failed; its log says why"

_LONG_PROMPT = 64  # tokens; a shorter one is not worth watching
_OF_MODEL = ("eos_token_id", "pad_token_id", "bos_token_id")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_log = logging.getLogger("uvicorn.error")


class StoppedError(Exception):
    """Nobody waits for the rest, or the time is over."""


class Turns:
    """The thread that generates: turns in the order in which they came.

    Args:
        model: from `load_model`. Of its generation config only the ids and the ways of sampling are kept:
            the rest (beams, caches, stops) is not for a server to believe.
        tokenizer: its tokenizer.
        seconds: that a turn may take.
    """

    def __init__(self, model: Any, tokenizer: Any, seconds: float) -> None:
        self.model, self.tokenizer, self.seconds = model, tokenizer, seconds
        given = model.generation_config
        model.generation_config = GenerationConfig(
            **{name: getattr(given, name, None) for name in (*_OF_MODEL, *_SAMPLING)}
        )
        self.closing = threading.Event()
        self.thread = ThreadPoolExecutor(1, "generate")

    def close(self) -> None:
        """End all turns; returns when the thread has ended."""
        self.closing.set()
        self.thread.shutdown(wait=True, cancel_futures=True)


class Turn:
    """One request's generation.

    Args:
        turns: whose.
        asked: the request.
        visit: its place, given back when the generation is over.
    """

    def __init__(self, turns: Turns, asked: Asked, visit: Visit) -> None:
        self._turns, self._asked, self._visit, self._gone = turns, asked, visit, visit.gone

    def config(self, limit: int) -> GenerationConfig:
        """What the request asks for, over the model's own defaults."""
        asked, model = self._asked, self._turns.model
        changes: dict[str, Any] = {"max_new_tokens": limit}
        changes |= {name: value for name in _SAMPLING if (value := getattr(asked, name, None)) is not None}
        if asked.temperature is not None:
            changes["do_sample"] = asked.temperature > 0
        elif asked.top_p is not None:
            changes["do_sample"] = True
        made = GenerationConfig(**{**model.generation_config.to_diff_dict(), **changes})
        if not made.do_sample:
            made.temperature = made.top_p = made.top_k = made.min_p = None
        return made

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple["asyncio.Queue[Any]", DirectStreamer]:
        """Begin; pieces of text come through the queue, then None or an error."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        parser: Any = None if response_parser is None else CallParser(response_parser)
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser=parser)

        def run() -> None:
            end: _StreamError | None
            try:
                self._generate(inputs, gen_config, streamer)
            except StoppedError as reason:
                end = _StreamError(str(reason))
            except Exception:
                _log.exception("generation failed")
                end = _StreamError(FAILED)
            else:
                end = None
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._visit.leave)
                if end is not None:
                    loop.call_soon_threadsafe(queue.put_nowait, end)

        self._turns.thread.submit(run)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, Tensor]:
        """(text, tokens of the prompt, new ids).

        Raises:
            StoppedError: the prompt alone took all the time.
        """

        def run() -> tuple[str, int, Tensor]:
            length = inputs["input_ids"].shape[1]
            new = self._generate(inputs, gen_config)[0, length:]
            return processor.decode(new, skip_special_tokens=True), length, new

        return await asyncio.get_running_loop().run_in_executor(self._turns.thread, run)

    def _generate(
        self, inputs: dict[str, Tensor], config: GenerationConfig, streamer: DirectStreamer | None = None
    ) -> Tensor:
        """Ids [1, T]. A turn whose time is over ends as if fewer tokens had been asked for."""
        turns, asked = self._turns, self._asked
        end = time.monotonic() + turns.seconds
        prompt = inputs["input_ids"].shape[1]

        def go_on() -> None:
            if self._gone.is_set() or turns.closing.is_set():
                raise StoppedError("the server stopped this answer")
            if time.monotonic() > end:
                raise StoppedError(
                    f"a prompt of {prompt} tokens is not read in {turns.seconds:g} s; shorten it"
                )

        def is_over(new: Tensor) -> bool:
            if self._gone.is_set() or turns.closing.is_set():
                return True
            if time.monotonic() <= end:
                return False
            config.max_new_tokens = len(new)  # so that it counts as cut off
            return True

        go_on()
        torch.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        with _watched(turns.model, go_on, prompt) as unwatch:
            stop = _Stop(prompt, [unwatch, is_over, *_stops(asked, turns.tokenizer)])
            made: Tensor = turns.model.generate(
                **{name: values.to(turns.model.device) for name, values in inputs.items()},
                generation_config=config,
                streamer=streamer,
                logits_processor=LogitsProcessorList(_steering(asked, prompt)),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        return made


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation as soon as one of some functions of the new ids says so."""

    def __init__(self, prompt: int, checks: Sequence[Callable[[Tensor], bool]]) -> None:
        self._prompt, self._checks = prompt, checks

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        new = input_ids[0, self._prompt :]
        over = any([check(new) for check in self._checks])
        return torch.full((len(input_ids),), over, device=input_ids.device)


class _Steer(LogitsProcessor):  # type: ignore[misc]
    """The penalties and the bias of OpenAI's interface, added to the logits.

    transformers' own frequency penalty is another thing, a factor, and counts the prompt.
    """

    def __init__(self, prompt: int, frequency: float, presence: float, bias: dict[int, float]) -> None:
        self._prompt, self._frequency, self._presence, self._bias = prompt, frequency, presence, bias

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self._prompt :], minlength=scores.shape[-1])
        steered = scores - self._frequency * counts - self._presence * (counts > 0)
        if self._bias:
            steered[:, list(self._bias)] += torch.tensor([*self._bias.values()]).to(steered)
        return steered


def _steering(asked: Asked, prompt: int) -> list[LogitsProcessor]:
    frequency, presence, bias = (
        getattr(asked, name, None) for name in ("frequency_penalty", "presence_penalty", "logit_bias")
    )
    if not (frequency or presence or bias):
        return []
    return [
        _Steer(prompt, frequency or 0, presence or 0, {int(k): v for k, v in (bias or {}).items()}),
    ]


def _stops(asked: Asked, tokenizer: Any) -> list[Callable[[Tensor], bool]]:
    """Whether one of the texts that end an answer has just been completed.

    transformers' own way compares them with the whole vocabulary first, which takes seconds, and fails where
    no token matches.
    """
    texts: list[str] = getattr(asked, "stop", None) or []
    if not texts:
        return []
    tail = max(len(text.encode()) for text in texts) + 8  # a token has at least a byte

    def said(new: Tensor) -> bool:
        text = tokenizer.decode(new[-tail:], skip_special_tokens=True)
        return any(stop in text for stop in texts)

    return [said]


@contextmanager
def _watched(model: nn.Module, go_on: Callable[[], None], prompt: int) -> Iterator[Callable[[Tensor], bool]]:
    """Have `go_on` called before each layer of a long prompt; yields what ends that, at the first new token.

    Afterwards no hook may be left: the native step is not taken where there is one.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for inner in lists for layer in inner] if prompt > _LONG_PROMPT else []
    handles = [layer.register_forward_pre_hook(lambda *_: go_on()) for layer in layers]

    def unwatch(_: object = None) -> bool:
        while handles:
            handles.pop().remove()
        return False

    try:
        yield unwatch
    finally:
        unwatch()
