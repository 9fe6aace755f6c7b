"""Prompts rendered and encoded in a process of their own: one that takes too long costs only itself."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dbrx_quant.runtime.tokenizer.line_process import LineProcess
from dbrx_quant.runtime.tokenizer.template import TemplateError

SECONDS = 10
MEGABYTES = 1024


class TextProcess:
    """The process that renders and encodes for one tokenizer; started at once, ready a second or two later.

    Requests wait for each other. Close it, or use it as a context manager.

    Args:
        tokenizer: a fast tokenizer of transformers.
        seconds: of one request.
        megabytes: that a request may take.
    """

    def __init__(self, tokenizer: Any, *, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._process = LineProcess(tokenizer._tokenizer.to_str, megabytes)
        self._process.start()

    def __enter__(self) -> "TextProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, also amid a request."""
        self._process.close()

    def encode(self, text: str, most: int) -> tuple[list[int] | None, int]:
        """The ids of a text, as the tokenizer gives, or None if there are more than `most`; and their number.

        Raises:
            TemplateError: see there.
        """
        answer = self._ask({"text": text, "most": most})
        return answer["ids"], answer["count"]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        most: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int] | None, int]:
        """The ids of a conversation with the opening of the answer, or None if there are more than `most`.

        Args:
            messages: with role and content.
            most: ids that are of use.
            tools: for templates that tell the model about tools.
            variables: further ones of the template.

        Returns:
            the ids and their number.

        Raises:
            TemplateError: see there.
        """
        answer = self._ask(self._chat(messages, tools, variables) | {"most": most})
        return answer["ids"], answer["count"]

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation with the opening of the answer.

        Raises:
            TemplateError: see there.
        """
        text: str = self._ask(self._chat(messages, None, variables) | {"most": None})["text"]
        return text

    def _chat(self, messages: Any, tools: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "messages": list(messages),
            "template": self._tokenizer.get_chat_template(tools=tools),
            "variables": {
                **self._tokenizer.special_tokens_map,
                **variables,
                "tools": tools,
                "add_generation_prompt": True,
            },
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request | {"seconds": self._seconds})
        answer = self._process.exchange(line, self._seconds)
        if answer is None:
            raise TemplateError(f"took longer than {self._seconds} s, or ended the process that it ran in")
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer
