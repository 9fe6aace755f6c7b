"""Calls of tools in what a model wrote; what cannot be read as one stays text.

transformers' parsers raise at calls that are cut off or malformed, which any model may write, and any client
may have it write.
"""

import logging
from collections.abc import Callable
from typing import Any

from transformers.cli.serving.utils import response_events_to_chunks

_log = logging.getLogger("uvicorn.error")


class CallParser:
    """A parser of transformers' streams that passes on as text what the other cannot read.

    Args:
        parser: the other.
    """

    def __init__(self, parser: Any) -> None:
        self._parser, self._failed = parser, False
        self.initial_events = parser.initial_events

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The events of a piece of text."""
        return self._tried(lambda: self._parser.feed(text), text)

    def finalize(self) -> tuple[None, list[dict[str, Any]]]:
        """The events of the end."""
        return None, self._tried(lambda: self._parser.finalize()[1], "")

    def _tried(self, read: Callable[[], list[dict[str, Any]]], text: str) -> list[dict[str, Any]]:
        if not self._failed:
            try:
                events = read()
                response_events_to_chunks(events)  # as the caller will
            except Exception as error:
                _log.warning("a call of a tool cannot be read: %s", type(error).__name__)
                self._failed = True
            else:
                return events
        return [{"type": "region_chunk", "field": "content", "text": text}] if text else []


def tolerant(parse: Callable[..., Any], decode: Callable[..., str]) -> Callable[..., Any]:
    """A tokenizer's `parse_response` that takes as text what it cannot read.

    Args:
        parse: the tokenizer's.
        decode: the tokenizer's `decode`.
    """

    def parsed(ids: Any, *arguments: Any, **options: Any) -> Any:
        try:
            made = parse(ids, *arguments, **options)
            calls = made.get("tool_calls") or []
            response_events_to_chunks([_closed(value) for value in calls])  # as the caller will
        except Exception as error:
            _log.warning("a call of a tool cannot be read: %s", type(error).__name__)
            return {"content": decode(ids, skip_special_tokens=True)}
        return made

    return parsed


def _closed(value: Any) -> dict[str, Any]:
    return {"type": "region_close", "field": "tool_calls", "value": value}
