"""The document that a record of a data set holds: a text, or a conversation in one of its usual forms.

messages, conversations, conversation    turns: role and content, or from and value; also as JSON text
text                                     a text, or a list of texts
prompt and completion (or response)      a question and its answer, texts or turns
instruction, input and output            likewise; the input may be missing
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from dbrx_quant.calibration.text.offline import Conversation
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.text import unicode_fault

Document = str | Conversation

ACCEPTED = "messages or text, conversations, prompt and completion, or instruction and output"

_TURNS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_MORE = "input"  # of an instruction
_FORMS = (("messages",), ("text",), *((name,) for name in _TURNS[1:]), *_PAIRS)
_ROLES = {  # of ShareGPT's `from`
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def form_among(columns: Collection[str]) -> tuple[str, ...] | None:
    """The columns of the first form that is whole among those; None: there is none."""
    found = next((form for form in _FORMS if set(form) <= set(columns)), None)
    return (*found, _MORE) if found and found[0] == "instruction" and _MORE in columns else found


def of_any_form(columns: Collection[str]) -> bool:
    """Whether one of the columns belongs to a form."""
    return any(set(form) & set(columns) for form in _FORMS)


def document_of(record: Mapping[str, Any], column: str | None, where: str) -> Document | None:
    """The document that a record holds (None: an empty one).

    Args:
        record: column → value.
        column: the one that holds it; None: those of the first form that the record has, else all strings,
            joined by line feeds.
        where: its place, for errors.

    Raises:
        CheckpointError: no such column, or its value is neither text nor messages, or no Unicode.
    """
    if column is not None:
        if column not in record:
            raise CheckpointError(f"{where}: no column {column!r}, only {', '.join(record) or '(none)'}")
        return _document(record[column], column, where)
    form = form_among([name for name, value in record.items() if value is not None])
    if form is None:
        texts = [value for value in record.values() if isinstance(value, str) and value.strip()]
        if not texts and not any(value is None or isinstance(value, str) for value in record.values()):
            raise CheckpointError(
                f"{where}: neither messages nor text in columns {', '.join(record)}; taken are {ACCEPTED}"
            )
        return _text("\n".join(texts), where)
    parts = [_document(record[name], name, where) for name in form]
    if len(form) == 1:
        return parts[0]
    question, answer, *more = parts
    if not question or not answer:
        return None
    asked = _turns_of(question, "user")
    if more and isinstance(more[0], str):
        asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n\n{more[0]}"}
    return [*asked, *_turns_of(answer, "assistant")]


def _turns_of(document: Document, role: str) -> Conversation:
    return [{"role": role, "content": document}] if isinstance(document, str) else list(document)


def _document(value: Any, column: str, where: str) -> Document | None:
    if isinstance(value, bytes):
        value = _decoded(value, f"{where}: column {column!r}")
    if isinstance(value, str):
        listed = _listed(value) if column in _TURNS else None
        if listed is None:
            return _text(value, f"{where}: column {column!r}")
        value = listed
    if value is None:
        return None
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        # how `datasets` gives a sequence of objects
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        kind = type(value).__name__
        raise CheckpointError(f"{where}: column {column!r} is neither text nor messages, but {kind}")
    flat = _flat(value)
    if column not in _TURNS and all(isinstance(part, str) for part in flat):
        return _text("\n".join(flat), f"{where}: column {column!r}")
    return [_turn(turn, where) for turn in flat] or None


def _text(text: str, where: str) -> str | None:
    """The text, None if it is blank."""
    if fault := unicode_fault(text):
        raise CheckpointError(f"{where}: {fault}")
    return text if text.strip() else None


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}; convert it first") from error


def _listed(text: str) -> Any:
    """The list or object that a text holds as JSON, None for any other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _flat(values: list[Any]) -> list[Any]:
    """The items of lists within lists, missing ones left out."""
    flat: list[Any] = []
    for value in values:
        flat += _flat(value) if isinstance(value, list) else [] if value is None else [value]
    return flat


def _turn(turn: Any, where: str) -> dict[str, str]:
    """A turn as chat templates take it; calls of tools become text."""
    wrong = CheckpointError(f"{where}: a message needs a role and a content, both text; got {str(turn)[:80]}")
    if not isinstance(turn, dict):
        raise wrong
    role = turn.get("role")
    if role is None and isinstance(turn.get("from"), str):
        role = _ROLES.get(turn["from"], turn["from"])
    parts = [_content(turn[key], where) for key in ("content", "value") if turn.get(key) is not None]
    parts += [_call(call) for key in ("tool_calls", "function_call") for call in _calls(turn.get(key))]
    known = any(key in turn for key in ("content", "value"))
    if not isinstance(role, str) or not all(isinstance(part, str) for part in parts) or not (parts or known):
        raise wrong
    content = "\n".join(part for part in parts if part)
    for text in (role, content):
        if fault := unicode_fault(text):
            raise CheckpointError(f"{where}: a message is {fault}")
    return {"role": role, "content": content}


def _content(value: Any, where: str) -> Any:
    """The content of a turn: a text, bytes, or parts of text."""
    if isinstance(value, bytes):
        return _decoded(value, where)
    if not isinstance(value, list):
        return value
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise CheckpointError(f"{where}: a message has parts that are no text: {str(value)[:80]}")
    return "\n".join(texts)


def _calls(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if not value else [value]


def _call(call: Any) -> str:
    """A call of a tool as JSON: its name and arguments."""
    if isinstance(call, str):
        return call
    function = call.get("function", call) if isinstance(call, dict) else call
    if isinstance(function, dict):
        arguments = function.get("arguments")
        parsed = _listed(arguments) if isinstance(arguments, str) else None
        function = function if parsed is None else {**function, "arguments": parsed}
    return json.dumps(function, ensure_ascii=False, default=str)
