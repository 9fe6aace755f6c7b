"""Chat templates, rendered in a process of their own with limits: each is a program that a stranger wrote.

The process starts with the first template (about a second), renders all that follow, and ends with ours.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.tokenizer.line_process import LineProcess

SECONDS = 5  # of processor time for one text
MEGABYTES = 256
LONGEST = 16_000_000  # characters of a text
_WAIT_SECONDS = 60  # on a busy machine

_PROCESS = LineProcess(lambda: "null", MEGABYTES)


class TemplateError(ValueError):
    """A chat template, or a tokenizer, fails on what it is given, or wants too much time or memory."""


def render(
    template: str, messages: Sequence[Any], /, *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The text of a conversation under a template, as transformers renders it.

    Args:
        template: Jinja source.
        messages: of the conversation; plain JSON values.
        add_generation_prompt: whether to end with what opens an answer.
        **variables: what else the template sees, such as `bos_token`; a folder may name them as it likes.

    Raises:
        TemplateError: it fails, takes more than SECONDS or MEGABYTES, or makes more than LONGEST characters.
    """
    request = {
        "messages": list(messages),
        "template": template,
        "variables": {"add_generation_prompt": add_generation_prompt, **variables},
        "most": None,
        "longest": LONGEST,
        "seconds": SECONDS,
    }
    answer = _answer(json.dumps(request))
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def chat_ids(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """The ids of a conversation, the answer opened, as transformers' `apply_chat_template` gives them.

    Raises:
        CheckpointError: the tokenizer's template cannot be rendered.
    """
    template, tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    try:
        text = render(template, messages, **{**tokens, "add_generation_prompt": True})
    except TemplateError as error:
        where = tokenizer.name_or_path
        raise CheckpointError(f"{where}: the chat template cannot be rendered: {error}") from None
    return [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]


@functools.lru_cache(maxsize=64)
def _answer(request: str) -> dict[str, str]:
    answer = _PROCESS.exchange(request, _WAIT_SECONDS)
    return {"error": f"it takes more than {SECONDS} seconds or {MEGABYTES} MB"} if answer is None else answer
