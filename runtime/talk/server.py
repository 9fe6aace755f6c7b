"""transformers' own OpenAI-compatible server for one model of ours.

transformers builds the web application, its handlers render chats, stream answers and count tokens; here is
what they need to serve an EXL2 folder and nothing else: a model manager that loads by `load_model` and knows
one name, and handlers that refuse bad requests by themselves, where transformers would fail inside.

Wants `transformers[serving]`; imports it: import it where that is known to be there.
"""

import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from concurrent.futures import TimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState
from transformers.utils.logging import get_logger

from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.tokenizer.load import load_tokenizer

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
_OPEN_PATHS = ("/health",)  # for whoever watches over the server
_MOST_NEW_TOKENS = 1024  # where a request names no limit; transformers' own default
_END_SECONDS = 60
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class OneModel(ModelManager):  # type: ignore[misc]
    """Serves a single model, from a folder, under one name.

    Args:
        folder: the EXL2 folder.
        name: what clients call it.
        device: where to put it.
        state: what runs its generations.
    """

    def __init__(self, folder: Path, name: str, device: str, state: GenerationState) -> None:
        self.folder, self.name, self._where, self._state = folder, name, device, state
        self._closing = False
        self._created = int(time.time())
        super().__init__(device=device, force_model=name)  # which loads it

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Names stay as they are: there are no revisions."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
        """The model and its tokenizer.

        Raises:
            HTTPException: 404, another model was asked for.
        """
        if model_id_and_revision != self.name:
            raise HTTPException(
                404, f"no model {model_id_and_revision!r} here; this server has {self.name!r}"
            )
        return super().load_model_and_processor(model_id_and_revision, *args, **options)

    def get_gen_models(self, cache_dir: str | None = None) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The list of models: one."""
        return [{"id": self.name, "object": "model", "created": self._created, "owned_by": "dbrx-quant"}]

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        return load_tokenizer(self.folder)

    def _load_model(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
        model = load_model(self.folder, device=self._where)
        model.register_forward_pre_hook(self._go_on)
        return model

    def _go_on(self, *_: Any) -> None:
        if self._closing:
            raise RuntimeError("the server is stopping")

    def shutdown(self) -> None:
        """Stop all generation: Python must not exit while another thread computes."""
        self._closing = True
        with suppress(TimeoutError):  # a very long prompt is being read
            manager: Any = self._state.get_manager(self.name)
            manager.submit(lambda: None).result(_END_SECONDS)
        super().shutdown()


class _Checked(ABC):
    """Checks a handler's requests before transformers sees them."""

    model_manager: OneModel

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; 4xx for one that cannot be answered."""
        self._validate_request(body)  # type: ignore[attr-defined]  # unknown fields
        check_numbers(body)
        asked = body.get("model")
        if asked not in (None, self.model_manager.name):
            raise HTTPException(404, f"no model {asked!r} here; this server has {self.model_manager.name!r}")
        _, model, tokenizer = self._resolve_model(body)  # type: ignore[attr-defined]
        self._bound(body, self._prompt(body, tokenizer), model.config)
        return await super().handle_request(body, request_id)  # type: ignore[misc]

    @abstractmethod
    def _prompt(self, body: dict[str, Any], tokenizer: Any) -> int:
        """The number of prompt tokens in a request."""

    def _bound(self, body: dict[str, Any], prompt: int, config: Any) -> None:
        """Keep prompt and answer within the model's context."""
        context = getattr(config, "max_position_embeddings", None)
        if context is None:
            return
        if prompt >= context:
            raise HTTPException(
                400, f"the request has {prompt} tokens, the model's context is {context} including the answer"
            )
        given = [key for key in _LIMITS if body.get(key) is not None]
        for key in given or [self._limit]:
            body[key] = min(int(body.get(key) or _MOST_NEW_TOKENS), context - prompt)

    _limit = "max_tokens"

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **options: Any) -> Any:
        """As transformers, which does not sample at a temperature unless the model's own config says so."""
        config = super()._build_generation_config(body, *args, **options)  # type: ignore[misc]
        if body.get("temperature") is not None:
            config.do_sample = float(body["temperature"]) > 0
            if not config.do_sample:
                config.temperature = config.top_p = config.top_k = None
        elif body.get("top_p") is not None:
            config.do_sample = True
        return config


class _Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    def _prompt(self, body: dict[str, Any], tokenizer: Any) -> int:
        return _chat_tokens(body, "messages", tokenizer)


class _Responses(_Checked, ResponseHandler):  # type: ignore[misc]
    _limit = "max_output_tokens"

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As the others, but streaming only on request, where transformers streams by default."""
        body.setdefault("stream", False)
        return await super().handle_request(body, request_id)

    def _prompt(self, body: dict[str, Any], tokenizer: Any) -> int:
        if isinstance(body.get("input"), str):
            return len(tokenizer(body["input"])["input_ids"])
        return _chat_tokens(body, "input", tokenizer)


class _Completions(_Checked, CompletionHandler):  # type: ignore[misc]
    def _prompt(self, body: dict[str, Any], tokenizer: Any) -> int:
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise HTTPException(400, "prompt must be a non-empty string")
        return len(tokenizer(body["prompt"])["input_ids"])


def build_app(folder: Path, name: str, device: str, api_key: str | None = None) -> FastAPI:
    """The web application, its model loaded.

    Args:
        folder: the EXL2 folder.
        name: what clients call the model.
        device: where to put it.
        api_key: what clients must send as their bearer token, if anything.

    Raises:
        CheckpointError: as `load_model`.
    """
    get_logger("transformers").setLevel(logging.ERROR)  # a line for each request, and what it ignores
    state = GenerationState()
    manager = OneModel(folder, name, device, state)
    app: FastAPI = build_server(
        manager,
        _Chat(manager, state),
        completion_handler=_Completions(manager, state),
        response_handler=_Responses(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )

    # Not for clients: unloading the model, loading others; nor what our models cannot do (speech).
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") in _PATHS]

    async def refuse(request: Request, error: Any) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    async def reject(request: Request, error: Any) -> JSONResponse:
        faults = "; ".join(f"{fault['msg']} {fault.get('ctx') or ''}".strip() for fault in error.errors())
        return _error(400, f"not a valid JSON object: {faults}")

    async def fail(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"{type(error).__name__}: {error}")

    async def authenticate(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").encode()
        if request.url.path in _OPEN_PATHS or secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            return await call_next(request)
        return _error(401, "missing or wrong API key")

    app.add_exception_handler(AnyHTTPException, refuse)
    app.add_exception_handler(RequestValidationError, reject)
    app.add_exception_handler(Exception, fail)
    if api_key is not None:
        app.middleware("http")(authenticate)
    return app


def check_numbers(body: dict[str, Any]) -> None:
    """Check the numeric fields of a request.

    Raises:
        HTTPException: 400, one is not a number or out of range.
    """
    for key in _LIMITS:
        value = body.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise HTTPException(400, f"{key} must be a whole number of at least 1, not {value!r}")
    for key, least, most in (("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0)):
        value = body.get(key)
        if value is not None and (
            not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most
        ):
            raise HTTPException(400, f"{key} must be a number from {least:g} to {most:g}, not {value!r}")


def _chat_tokens(body: dict[str, Any], key: str, tokenizer: Any) -> int:
    """Tokens of the conversation in a request.

    Raises:
        HTTPException: 400, it is none, or the model's chat template refuses it.
    """
    messages = body.get(key)
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, f"{key} must be a non-empty list of messages")
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise HTTPException(400, f"{key}[{index}] must be an object with role and content")
        plain.append({"role": message["role"], "content": _text(message.get("content"), f"{key}[{index}]")})
    if not tokenizer.chat_template:
        raise HTTPException(400, "the model has no chat template; use /v1/completions")
    try:
        return len(tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program, it can refuse in any way
        raise HTTPException(400, f"the chat template rejects the messages: {error}") from error


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return " ".join(part["text"] for part in content)
    raise HTTPException(
        400, f"{where}.content must be a string or a list of texts: {json.dumps(content)[:80]}"
    )


def _error(status: int, message: str) -> JSONResponse:
    """An error in the form that OpenAI's clients expect."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
