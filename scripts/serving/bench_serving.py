"""Requests a second of a server that is running, at several numbers of clients: one figure for each.

    python -m dbrx_quant.scripts.serving.bench_serving http://127.0.0.1:8000/v1 --clients 1,4,16,64

Every client sends one request after another, each for the same number of tokens; the prompts differ. A first
request, which may have to build something, does not count. Prints a table, or JSON with `--json`.
"""

import argparse
import json
import os
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dbrx_quant.scripts.terminal.output import print_json, print_table, quiet_on_closed_pipe

_SECONDS = 600
_WORDS = ("import", "class", "return", "for line in", "def test", "with open", "raise", "while True")


def ask(url: str, model: str, prompt: str, tokens: int) -> int:
    """Ask for a completion; returns the tokens that came."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DBRXQ_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def measure(url: str, model: str, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """Send `requests` requests from `clients` clients at once.

    Returns:
        `requests` and `tokens` a second, of answers.
    """
    prompts = [f"# {index}\n{_WORDS[index % len(_WORDS)]} " for index in range(requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        came = sum(threads.map(lambda prompt: ask(url, model, prompt, tokens), prompts))
    seconds = time.perf_counter() - started
    return {"clients": clients, "requests": requests / seconds, "tokens": came / seconds}


def served_model(url: str) -> str:
    """The name of the model that a server has."""
    with urllib.request.urlopen(f"{url}/models", timeout=_SECONDS) as answer:
        return str(json.load(answer)["data"][0]["id"])


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Requests a second of a running server.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", default="1,4,16,64", help="numbers of them (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=64, help="in all, at each number (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    model = served_model(arguments.url)
    ask(arguments.url, model, "warm", arguments.tokens)
    found = [
        measure(arguments.url, model, int(clients), arguments.requests, arguments.tokens)
        for clients in arguments.clients.split(",")
    ]
    if arguments.json:
        print_json({"model": model, "runs": found})
    else:
        print_table(model, ["clients", "requests/s", "tokens/s"], _rows(found))
    return 0


def _rows(found: list[dict[str, float]]) -> list[list[Any]]:
    return [[f"{one['clients']:.0f}", f"{one['requests']:.2f}", f"{one['tokens']:.1f}"] for one in found]


if __name__ == "__main__":
    raise SystemExit(main())
