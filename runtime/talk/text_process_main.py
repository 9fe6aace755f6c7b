"""The program of the process that `text_process.py` keeps: renders and encodes, a line for each request.

Run by its path, so that it imports nothing of ours, nor torch: it is ready in a second and is small.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def main(megabytes: int) -> None:
    """Answer the requests on stdin until it closes; the first line is the tokenizer, as JSON.

    A request is an object. After `seconds` the kernel ends this process, in case nobody is left to do it.
    There is either `text`, to be encoded with the tokens that begin a text, or `messages`, with the
    `template` and its `variables`. At `most` so many ids are wanted; where it is null, the text is. The
    answer is one of `{"ids": …, "count": …}`, ids null if there are more, `{"text": …}`, `{"error": …}`.
    """
    from tokenizers import Tokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print is no answer
    tokenizer = Tokenizer.from_str(sys.stdin.readline())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    most = _size() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

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
            return {"text": text}
        ids = tokenizer.encode(text, add_special_tokens=whole).ids
        return {"ids": ids if len(ids) <= request["most"] else None, "count": len(ids)}

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(request["seconds"])
        try:
            told = json.dumps(answer(request))
        except MemoryError:
            told = json.dumps({"error": f"wants more than {megabytes} MB of memory"})
        except Exception as error:  # a template is a program, it can fail in any way
            told = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        signal.alarm(0)
        print(told, file=answers, flush=True)


def _size() -> int:
    """Bytes of address space that this process has."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # no Linux
        return 4 * 2**30
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]))
