"""The types of a request's fields: what each may hold, and how a fault in it is told.

Wants `pydantic`, which comes with FastAPI.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import from_json

MOST_MESSAGES = 4096
MOST_TOOLS = 128

_SHOWN = 60  # characters of a wrong value


def said(what: str) -> WrapValidator:
    """Says what a value must be in our words; what is wrong inside of it has its own."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors()[0]["loc"] or error.errors()[0]["type"] == "value_error":
                raise
            raise ValueError(f"must be {what}, not {shown(value)}") from None

    return WrapValidator(check)


def text_as(key: str, **others: str) -> BeforeValidator:
    """A string in place of a list stands for a list of one object with it."""
    return BeforeValidator(lambda value: [{**others, key: value}] if isinstance(value, str) else value)


def _parsed(value: Any) -> Any:
    try:
        return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None


def _nested(value: Any) -> Any:
    """A tool as chats declare it, of one as responses do."""
    if isinstance(value, dict) and "function" not in value:
        kind = {"type": value["type"]} if "type" in value else {}
        return {**kind, "function": {key: inner for key, inner in value.items() if key != "type"}}
    return value


Text = Annotated[str, said("a string")]
Name = Annotated[str, Field(min_length=1, max_length=256), said("a string of 1 to 256 characters")]
Flag = Annotated[bool, said("true or false")]
Tokens = Annotated[int, Field(ge=1, lt=2**31), said("a whole number of at least 1")]
Share = Annotated[float, Field(ge=0, le=1), said("a number from 0 to 1")]
Temperature = Annotated[float, Field(ge=0, le=2), said("a number from 0 to 2")]
Factor = Annotated[float, Field(ge=0.01, le=2), said("a number from 0.01 to 2")]
Penalty = Annotated[float, Field(ge=-2, le=2), said("a number from -2 to 2")]
TopK = Annotated[int, Field(ge=0, lt=2**31), said("a whole number of at least 0")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), said("a whole number of at most 64 bits")]
Stops = Annotated[
    list[Name],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=4),
    said("a string or a list of at most 4"),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    said("an object of at most 1024 token ids, each with a number from -100 to 100"),
]
Object = Annotated[dict[str, Any], said("an object")]
Arguments = Annotated[dict[str, Any], said("a JSON object"), BeforeValidator(_parsed)]
Anything = list[Any]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Part(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Anything | None = None  # of an answer that is sent back
    logprobs: Anything | None = None


Content = Annotated[
    list[Annotated[Part, said("an object with type and text")]],
    Field(max_length=MOST_MESSAGES),
    said("a string or a list of texts"),
    text_as("text", type="text"),
]


class Call(Strict):
    name: Name
    arguments: Arguments


class ToolCall(Strict):
    function: Annotated[Call, said("an object with name and arguments")]
    id: Text | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class Function(Strict):
    name: Name
    description: Text | None = None
    parameters: Object | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Annotated[Function, said("an object with a name")]


Tools = Annotated[
    list[Annotated[Tool, said("an object with type and function"), BeforeValidator(_nested)]],
    Field(max_length=MOST_TOOLS),
    said(f"a list of at most {MOST_TOOLS} tools"),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: (
        Annotated[list[Annotated[ToolCall, said("an object with function")]], said("a list of calls")] | None
    ) = None
    tool_call_id: Text | None = None
    name: Text | None = None  # a label
    # What an answer has that is sent back:
    reasoning_content: Text | None = None
    annotations: Anything | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        made: dict[str, Any] = {"role": self.role, "content": joined(self.content)}
        if self.tool_calls:  # the template writes them; the content may hold them once more
            calls = [call.model_dump(exclude_none=True, exclude={"index"}) for call in self.tool_calls]
            made |= {"content": "", "tool_calls": calls}
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        return made


_ITEMS = {
    "message": ("role", "content"),
    "text": ("text",),
    "input_text": ("text",),
    "output_text": ("text",),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class Item(Strict):
    """A piece of a response's input: a message, a text, a tool's call, its output, or thoughts."""

    type: Literal[tuple(_ITEMS)] = "message"  # type: ignore[valid-type]  # pyright: ignore[reportInvalidTypeForm]
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    text: Text | None = None
    call_id: Text | None = None
    name: Name | None = None
    arguments: Arguments | None = None
    output: Content | None = None
    # What an answer has that is sent back:
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None
    summary: Anything | None = None
    annotations: Anything | None = None
    encrypted_content: None = None

    @model_validator(mode="after")
    def _complete(self) -> "Item":
        missing = [name for name in _ITEMS[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"must have {' and '.join(missing)}, being a {self.type}")
        return self


class StreamOptions(Strict):
    include_usage: Flag | None = None  # the end of a stream tells it in any case
    include_obfuscation: Literal[False] | None = None


class TemplateVariables(Strict):
    enable_thinking: Flag | None = None


class PlainText(Strict):
    type: Literal["text"]


class TextOptions(Strict):
    format: Annotated[PlainText, said("an object with a type")] | None = None


def joined(parts: list[Part] | None) -> str:
    """The texts of a content as one."""
    return " ".join(part.text for part in parts or ())


def explain(error: ValidationError) -> str:
    """The first fault: where, what was expected, what there is."""
    fault = error.errors(include_url=False)[0]
    where = ""
    for step in fault["loc"]:
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else step
    where = where if len(where) <= 2 * _SHOWN else f"{where[: 2 * _SHOWN]}…"
    given = shown(fault["input"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: no such field is served here"
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] in ("literal_error", "none_required"):
        served = (
            fault.get("ctx", {}).get("expected", "null").replace("False", "false").replace("True", "true")
        )
        return f"{where}: only {served} is served, not {given}"
    if fault["type"] == "value_error":
        return f"{where} {fault.get('ctx', {}).get('error')}"
    return f"{where}: {re.sub('^Input ', '', fault['msg'])}, not {given}"


def shown(value: Any) -> str:
    """A value in a message: short, and as JSON has it."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
