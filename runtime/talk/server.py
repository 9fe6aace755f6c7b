"""An OpenAI-compatible server for one model, with answers put together by transformers' own.

A request passes the door (`door.py`), is read against a list of fields (`requests.py`), becomes token ids in
a process of its own (`text_process.py`) and has its turn at the model (`turns.py`). How answers and
streams look is transformers' code. Nothing that takes long is done on the event loop.

Wants `transformers[serving]`; imports it: import it where that is known to be there.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response as Answer
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.utils.logging import get_logger

from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.model.memory import Notify
from dbrx_quant.runtime.talk.calls import tolerant
from dbrx_quant.runtime.talk.door import Door, Places, error_response
from dbrx_quant.runtime.talk.requests import (
    Asked,
    BadRequestError,
    Chat,
    Completion,
    Response,
    Templated,
    read_request,
)
from dbrx_quant.runtime.talk.text_process import TextProcess
from dbrx_quant.runtime.talk.turns import FAILED, StoppedError, Turn, Turns
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.runtime.tokenizer.template import TemplateError

QUEUE = 64
SECONDS = 600.0

_CONTEXT = 32768  # where a model names none
_NEW_TOKENS = 1024  # where a request names no limit
_BYTES_PER_TOKEN = 32  # of a body, generously: text, JSON and tools
_LEAST_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """What clients may use.

    Attributes:
        queue: requests that may wait, besides the one at the model.
        seconds: that one may take there.
        context: tokens of prompt and answer together; None: the model's own.
    """

    queue: int = QUEUE
    seconds: float = SECONDS
    context: int | None = None


def build_app(
    folder: Path,
    name: str,
    device: str,
    api_key: str | None = None,
    hosts: Collection[str] = (),
    limits: Limits = Limits(),
    *,
    memory: int | None = None,
    gpu_memory: GpuMemory | None = None,
    notify: Notify | None = None,
) -> Door:
    """The web application, its model loaded.

    Args:
        folder: the EXL2 folder.
        name: what clients call the model.
        device: where to put it.
        api_key: what clients must send as their bearer token, if anything.
        hosts: further names that the server is called by.
        limits: of each request.
        memory: as `load_model` takes it.
        gpu_memory: likewise.
        notify: likewise.

    Raises:
        CheckpointError: as `load_model`.
    """
    get_logger("transformers").setLevel(logging.ERROR)  # what it thinks of options
    tokenizer = load_tokenizer(folder)
    tokenizer.response_template = None  # the folder's patterns may never end; transformers has some
    tokenizer.parse_response = tolerant(tokenizer.parse_response, tokenizer.decode)
    texts = TextProcess(tokenizer)
    try:
        model = load_model(folder, device=device, memory=memory, gpu_memory=gpu_memory, notify=notify)
        texts.encode("", 0)  # it is ready when the server is
    except BaseException:
        texts.close()
        raise
    service = _Service(model, tokenizer, texts, name, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    async def refuse(request: Request, error: Any) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    async def reject(request: Request, error: Exception) -> JSONResponse:
        return error_response(400, str(error))

    async def fail(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, FAILED)  # the exception may name paths of this machine

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/responses", service.respond, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/health", _health),
        ],
        exception_handlers={
            HTTPException: refuse,
            BadRequestError: reject,
            StoppedError: reject,
            Exception: fail,
        },
        lifespan=lifespan,
    )
    app.state.service = service
    most_bytes = max(_LEAST_BYTES, _BYTES_PER_TOKEN * service.context)
    return Door(app, Places(limits.queue + 1), most_bytes, api_key, hosts)


class _Service:
    """The model, and what answers requests to it."""

    def __init__(self, model: Any, tokenizer: Any, texts: TextProcess, name: str, limits: Limits) -> None:
        self.name, self.created = name, int(time.time())
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        own = getattr(model.config, "max_position_embeddings", None) or _CONTEXT
        self.context: int = min(limits.context or own, own)
        self.turns = Turns(model, tokenizer, limits.seconds)
        self.text_thread = ThreadPoolExecutor(1, "texts")
        nobody: Any = None  # only their ways of putting answers together are used, which need no managers
        self._chats = ChatCompletionHandler(nobody, nobody)
        self._completions = CompletionHandler(nobody, nobody)
        self._responses = ResponseHandler(nobody, nobody)

    def close(self) -> None:
        """End all that runs."""
        self.texts.close()
        self.text_thread.shutdown(cancel_futures=True)
        self.turns.close()

    async def models(self, request: Request) -> JSONResponse:
        """The list of models: one."""
        one = {"id": self.name, "object": "model", "created": self.created, "owned_by": "dbrx-quant"}
        return JSONResponse({"object": "list", "data": [one]})

    async def complete(self, request: Request) -> Answer:
        """Continue a text."""
        asked = read_request(Completion, await request.body())
        self._check(asked)
        ids = await self._ids("prompt", self.texts.encode, asked.prompt)
        return await self._answer(self._completions, request, asked, ids)

    async def chat(self, request: Request) -> Answer:
        """Answer a conversation."""
        asked = read_request(Chat, await request.body())
        ids = await self._chat_ids("messages", asked)
        return await self._answer(self._chats, request, asked, ids)

    async def respond(self, request: Request) -> Answer:
        """Answer a conversation in the form of the newer interface."""
        asked = read_request(Response, await request.body())
        ids = await self._chat_ids("input", asked)
        return await self._answer(self._responses, request, asked, ids, {"body": {}})

    def _check(self, asked: Asked) -> None:
        """Refuse another model, and tokens that this one does not have.

        Raises:
            HTTPException: 404.
            BadRequestError: a token.
        """
        if asked.model not in (None, self.name):
            raise HTTPException(404, f"no model {asked.model[:80]!r} here; this server has {self.name!r}")
        vocabulary = self.model.config.vocab_size
        for token in getattr(asked, "logit_bias", None) or ():
            if int(token) >= vocabulary:
                raise BadRequestError(f"logit_bias: no token {token}; the model has {vocabulary}")

    async def _chat_ids(self, field: str, asked: Templated) -> list[int]:
        self._check(asked)
        if not self.tokenizer.chat_template:
            raise BadRequestError("the model has no chat template; use /v1/completions")
        tools, variables = asked.offered(), asked.variables()
        template = self.tokenizer.get_chat_template(tools=tools)
        unknown = [f"chat_template_kwargs.{name}" for name in variables if name not in template]
        unknown += ["tools"] if tools and "tools" not in template else []
        if unknown:
            raise BadRequestError(f"{unknown[0]}: the model's chat template does not know it")
        return await self._ids(
            field,
            lambda messages, most: self.texts.encode_chat(messages, most, tools, **variables),
            asked.conversation(),
        )

    async def _ids(
        self, field: str, encode: Callable[[Any, int], tuple[list[int] | None, int]], value: Any
    ) -> list[int]:
        """Token ids of a prompt, made off the event loop.

        Raises:
            BadRequestError: there are too many, none, or the template refuses.
        """
        loop = asyncio.get_running_loop()
        try:
            ids, count = await loop.run_in_executor(self.text_thread, encode, value, self.context - 1)
        except TemplateError as error:
            raise BadRequestError(f"{field}: the chat template or the tokenizer fails: {error}") from error
        if ids is None:
            raise BadRequestError(
                f"{field}: the request has {count} tokens, the model's context is {self.context} "
                "including the answer"
            )
        if not ids:
            raise BadRequestError(f"{field}: there is no token in it")
        return ids

    async def _answer(
        self, handler: Any, request: Request, asked: Asked, ids: list[int], more: dict[str, Any] | None = None
    ) -> Answer:
        turn = Turn(self.turns, asked, request.state.visit)
        prompt = torch.tensor([ids])
        made = handler._streaming if asked.stream else handler._non_streaming
        answer = made(
            request_id=request.state.visit.id,
            model=self.model,
            processor=self.tokenizer,
            model_id=self.name,
            inputs={"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
            gen_config=turn.config(min(asked.limit or _NEW_TOKENS, self.context - len(ids))),
            gen_manager=turn,
            **(more or {}),
        )
        return answer if asked.stream else await answer


async def _health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})
