"""What a client may ask for: the fields of the three kinds of requests.

A field that is not here is refused, and so is a value that asks for what is not done. A field with one
allowed value is here because clients send it, and says what is done anyway; what is taken and changes nothing
is marked as a label. Wants `pydantic`, which comes with FastAPI.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from dbrx_quant.runtime.talk.fields import (
    MOST_MESSAGES,
    Anything,
    Bias,
    Factor,
    Flag,
    Item,
    Message,
    Object,
    Penalty,
    PlainText,
    Seed,
    Share,
    Stops,
    StreamOptions,
    Strict,
    Temperature,
    TemplateVariables,
    Text,
    TextOptions,
    Tokens,
    Tools,
    TopK,
    explain,
    joined,
    said,
    shown,
    text_as,
)

T = TypeVar("T", bound="Asked")


class BadRequestError(ValueError):
    """A request is not one that can be answered; the message names the field."""


class Asked(Strict):
    """What the three kinds have in common."""

    model: Text | None = None
    stream: Flag = False
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Factor | None = None
    seed: Seed | None = None
    stream_options: Annotated[StreamOptions, said("an object")] | None = None
    user: Text | None = None  # a label

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, if the client named a number."""
        return None


class Steered(Asked):
    """What the older two have in common."""

    max_tokens: Tokens | None = None
    stop: Stops | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    logprobs: Literal[False] | None = None
    n: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        """See `Asked`."""
        return self.max_tokens


class Templated(Asked, ABC):
    """What the two with messages have in common."""

    tools: Tools | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: Annotated[TemplateVariables, said("an object")] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    metadata: Object | None = None  # labels
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @abstractmethod
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""

    def offered(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them; None if the model is to know of none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def variables(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        return self.chat_template_kwargs.model_dump(exclude_none=True) if self.chat_template_kwargs else {}


class Completion(Steered):
    """A request of /v1/completions."""

    prompt: Annotated[str, Field(min_length=1), said("a non-empty string")]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class Chat(Steered, Templated):
    """A request of /v1/chat/completions."""

    messages: Annotated[
        list[Annotated[Message, said("an object with role and content")]],
        Field(min_length=1, max_length=MOST_MESSAGES),
        said(f"a non-empty list of messages, at most {MOST_MESSAGES}"),
    ]
    max_completion_tokens: Tokens | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: Annotated[PlainText, said("an object with a type")] | None = None

    @property
    def limit(self) -> int | None:
        """See `Asked`."""
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> list[dict[str, Any]]:
        """See `Templated`."""
        return [message.plain() for message in self.messages]


class Response(Templated):
    """A request of /v1/responses."""

    input: Annotated[
        list[Annotated[Item, said("an object with type, or with role and content")]],
        Field(min_length=1, max_length=MOST_MESSAGES),
        said(f"a string or a non-empty list of messages, at most {MOST_MESSAGES}"),
        text_as("content", role="user"),
    ]
    instructions: Text | None = None
    max_output_tokens: Tokens | None = None
    background: Literal[False] | None = None
    include: Annotated[Anything, Field(max_length=0), said("empty: nothing is served here")] | None = None
    text: Annotated[TextOptions, said("an object")] | None = None
    truncation: Literal["disabled"] | None = None

    @property
    def limit(self) -> int | None:
        """See `Asked`."""
        return self.max_output_tokens

    def conversation(self) -> list[dict[str, Any]]:
        """See `Templated`."""
        made: list[dict[str, Any]] = []
        texts: list[str] = []  # of the user's message that is made up of texts without a role
        for item in self.input:
            if item.text is not None and item.role is None:
                if not texts:
                    made.append({"role": "user"})
                texts.append(item.text)
                made[-1]["content"] = " ".join(texts)
                continue
            texts = []
            if item.type == "function_call":
                if not made or made[-1]["role"] != "assistant":
                    made.append({"role": "assistant"})
                made[-1]["content"] = ""
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                made[-1].setdefault("tool_calls", []).append({**call, "type": "function"})
            elif item.type == "function_call_output":
                made.append({"role": "tool", "content": joined(item.output), "tool_call_id": item.call_id})
            elif item.type == "message":
                made.append({"role": item.role, "content": joined(item.content)})
        if self.instructions:
            rest = made[1:] if made and made[0]["role"] == "system" else made
            made = [{"role": "system", "content": self.instructions}, *rest]
        return made


def read_request(kind: type[T], body: bytes) -> T:
    """The request that a body holds; null is as good as absent.

    Raises:
        BadRequestError: it is none, with the first fault that was found.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"not a valid JSON object: {error}") from None
    if not isinstance(raw, dict):
        raise BadRequestError(f"not a valid JSON object, but {shown(raw)}")
    try:
        return kind.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        raise BadRequestError(explain(error)) from None
