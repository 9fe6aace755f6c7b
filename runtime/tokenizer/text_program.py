"""The program that `line_process.py` runs: renders chat templates and encodes texts, a line for each request.

Run by its path, so that it imports nothing of ours, nor torch: it is ready in a second and is small.
"""

import json
import math
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def main(megabytes: int) -> None:
    """Answer the requests on stdin until it closes; the first line is the tokenizer, as JSON, or null.

    A request is an object. `seconds` is the processor time that it may take; the kernel ends this process
    beyond it, also where nobody is left to do so. There is either `text`, to be encoded with the tokens that
    begin a text, or `messages`, with the `template` and its `variables`. At `most` so many ids are wanted;
    where it is null, the text is, of no more than `longest` characters if there is such a bound. The answer
    is one of `{"ids": …, "count": …}`, ids null if there are more, `{"text": …}`, `{"error": …}`.
    """
    from tokenizers import Tokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what others print is no answer
    tokenizer = None
    first = sys.stdin.buffer.readline()
    if first != b"null\n":
        tokenizer = Tokenizer.from_str(first.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    _limit(resource.RLIMIT_CORE, 0)
    _limit_memory(megabytes)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        whole = "text" in request
        if whole:
            text = request["text"]
        else:
            rendered, _ = render_jinja_template(
                conversations=[request["messages"]], chat_template=request["template"], **request["variables"]
            )
            text = rendered[0]
        if request["most"] is None:
            longest = request.get("longest")
            if longest is not None and len(text) > longest:
                return {"error": f"it makes {len(text)} characters, at most {longest} are taken"}
            return {"text": text}
        assert tokenizer is not None, "no tokenizer was given"
        ids = tokenizer.encode(text, add_special_tokens=whole).ids
        return {"ids": ids if len(ids) <= request["most"] else None, "count": len(ids)}

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_time(request["seconds"])
        try:
            told = json.dumps(answer(request))
        except MemoryError:
            told = json.dumps({"error": f"it takes more than {megabytes} MB"})
        except Exception as error:  # a template is a program, it can fail in any way
            told = json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]})
        print(told, file=answers, flush=True)
        _limit_time(request["seconds"])  # reading the next is not at its expense


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _limit_time(seconds: int) -> None:
    """Allow some seconds of processor time beyond those used."""
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)


def _limit_memory(megabytes: int) -> None:
    """Allow some memory beyond what is in use, where the system tells how much that is."""
    with suppress(FileNotFoundError):  # no Linux
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + megabytes * 2**20)


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    main(int(sys.argv[1]))
