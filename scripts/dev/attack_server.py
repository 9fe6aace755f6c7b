"""Attacks a server on loopback while a well-behaved client asks on: how long that waits, and what it is told.

    python -m dbrx_quant.scripts.dev.attack_server DIR

serves the folder with a short queue and little time for each request, makes one attack after another, and
tells for each what came of it, the longest wait of the client for an answer and for `/health`, and the memory
of the server. The client may wait as long as the queue says: its places times the time of a request. Exits
with 1 if it waited longer, or was told anything but that the queue is full; if the server grew, failed,
or did not stop. The folder should hold a model of a long context that does not end its answers by itself.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.terminal.output import print_table, quiet_on_closed_pipe

QUEUE, SECONDS = 8, 5
WORST = (QUEUE + 1) * SECONDS  # that the queue says
MOST_HEALTH = 3.0
MOST_MB = 600

CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "x"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


class Server:
    """The command as a process."""

    def __init__(self, folder: str) -> None:
        command = [
            sys.executable,
            "-m",
            "dbrx_quant.scripts.cli.main",
            "serve",
            folder,
            "--port",
            "0",
            "--json",
        ]
        limits = ["--name", "m", "--queue", str(QUEUE), "--timeout", str(SECONDS)]
        self.process = subprocess.Popen(
            [*command, *limits, "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        told = ""
        while not told.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"{folder}: the server did not start")
            told += line
        self.port = int(json.loads(told)["url"].split(":")[2].split("/")[0])

    def ask(self, path: str, body: Any = None, seconds: float = 120) -> tuple[int, bytes]:
        """(status, answer) of one request."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            link.request(
                "POST" if raw is not None else "GET", path, raw, {"Content-Type": "application/json"}
            )
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()

    def connect(self, said: bytes) -> socket.socket:
        """A connection that has said something."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        made.sendall(said)
        return made

    def megabytes(self) -> int:
        """The most memory that it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    def stop(self) -> float:
        """Seconds until SIGTERM has ended it."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return time.monotonic() - started


@dataclass
class Watch:
    """What the well-behaved client saw."""

    waits: list[float] = field(default_factory=list)
    healths: list[float] = field(default_factory=list)
    full: int = 0
    faults: list[str] = field(default_factory=list)


def watch(server: Server, stop: threading.Event, seen: Watch) -> None:
    """Ask for a token and for the server's health, again and again."""

    def timed(path: str, body: Any, times: list[float]) -> None:
        started = time.monotonic()
        try:
            status, _ = server.ask(path, body)
        except OSError as error:
            seen.faults.append(f"{path}: {error!r}")
            return
        if status == 503 and path == COMPLETE:
            seen.full += 1
        elif status != 200:
            seen.faults.append(f"{path}: {status}")
        times.append(time.monotonic() - started)

    while not stop.is_set():
        timed("/health", None, seen.healths)
        timed(COMPLETE, {"prompt": "x", "max_tokens": 1}, seen.waits)
        stop.wait(0.2)


def main_attacks(server: Server) -> dict[str, Callable[[], str]]:
    """By name, attacks that each return what came of them."""

    def statuses(*requests: tuple[str, Any]) -> str:
        return " ".join(str(server.ask(*one)[0]) for one in requests)

    def chat(**fields: Any) -> tuple[str, Any]:
        return CHAT, {"messages": HELLO, "max_tokens": 1, **fields}

    def complete(**fields: Any) -> tuple[str, Any]:
        return COMPLETE, {"prompt": "x", "max_tokens": 1, **fields}

    def templates() -> str:
        own = {"chat_template": LOOP}
        return statuses(
            chat(chat_template_kwargs=own),
            (RESPOND, {"input": "x", "chat_template_kwargs": own}),
            chat(chat_template_kwargs={"tokenize": False}),
        )

    def generation() -> str:
        return statuses(
            *(complete(**{name: 20_000}) for name in ("num_beams", "n", "best_of", "logprobs")),
            complete(generation_config=json.dumps({"num_beams": 20_000})),
            chat(generation_config={"num_beams": 20_000}),
        )

    def leave(stream: bool) -> Callable[[], str]:
        body = json.dumps({"prompt": "def f(", "max_tokens": 100_000, "stream": stream}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

        def attack() -> str:
            for _ in range(20):
                links = [
                    server.connect(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    for _ in "123456"
                ]
                time.sleep(0.2)
                for link in links:
                    link.close()
            return "120 left"

        return attack

    def stay() -> str:
        with ThreadPoolExecutor(40) as pool:
            made = pool.map(
                lambda _: server.ask(*complete(prompt="def f(", max_tokens=100_000))[0], range(40)
            )
            found = list(made)
        return ", ".join(f"{found.count(status)} x {status}" for status in sorted(set(found)))

    def bodies() -> str:
        words = json.dumps({"prompt": "x " * 2_500_000, "max_tokens": 1}).encode()
        large = b'{"model":"' + b"a" * 300_000_000 + b'"}'
        just = json.dumps({"prompt": "x " * 500_000, "max_tokens": 1}).encode()
        found = []
        for body in (words, large, just, b"[" * 900_000):
            with suppress(OSError):  # closed while we were sending
                found.append(str(server.ask(COMPLETE, body)[0]))
        return " ".join(found)

    def faults() -> str:
        odd: tuple[Any, ...] = ({"a": 1}, [[]], -1, 2**70, "\ud800", [None], {"role": []}, True)
        names = ("messages", "stop", "seed", "tools", "stream", "temperature", "logit_bias", "max_tokens")
        found = [server.ask(*chat(**{name: value}))[0] for name in names for value in odd]
        raw = (b"", b"{", b"NaN", rb'{"prompt": "\ud800"}', b'{"prompt": "x", "seed": ' + b"9" * 9999 + b"}")
        found += [server.ask(path, body)[0] for path in (CHAT, COMPLETE, RESPOND) for body in raw]
        return f"{len(found)} sent, " + (" ".join(str(s) for s in found if s >= 500) or "no failure")

    def half_open(said: bytes) -> Callable[[], str]:
        def attack() -> str:
            with ExitStack() as open_ones:
                for _ in range(1100):
                    with suppress(OSError):
                        open_ones.enter_context(server.connect(said))
                time.sleep(8)
            return "1100 opened"

        return attack

    def deaf() -> str:
        body = json.dumps({"prompt": "x", "max_tokens": 100_000, "stream": True}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with ExitStack() as open_ones:
            for _ in range(QUEUE):
                open_ones.enter_context(
                    server.connect(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                )
            time.sleep(8)
        return f"{QUEUE} never read"

    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    late = f"{head}Content-Length: 9\r\n\r\n{{"
    return {
        "nothing": lambda: time.sleep(5) or "",  # type: ignore[func-returns-value]
        "own templates": templates,
        "own generation configs": generation,
        "clients that left": leave(False),
        "the same, streaming": leave(True),
        "more than the queue holds": stay,
        "streams that nobody reads": deaf,
        "bodies of up to 300 MB": bodies,
        "faulty requests": faults,
        "half-open, in the headers": half_open(b"GET /health HTTP/1.1\r\nHost: x\r\nX-a: "),
        "half-open, in the body": half_open(late.encode()),
    }


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Attack; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="a quantized folder with a chat template")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    server = Server(arguments.folder)
    before = server.megabytes()
    rows, wrong = [], []
    for name, attack in main_attacks(server).items():
        stop, seen = threading.Event(), Watch()
        client = threading.Thread(target=watch, args=(server, stop, seen))
        client.start()
        came = attack()
        stop.set()
        client.join()
        wait, health, memory = max(seen.waits, default=0), max(seen.healths, default=0), server.megabytes()
        rows.append([name, came, f"{wait:.2f} s", str(seen.full), f"{health:.2f} s", f"{memory} MB"])
        wrong += [f"{name}: {fault}" for fault in seen.faults]
        wrong += [f"{name}: waited {wait:.1f} s, the queue says {WORST}"] if wait > WORST else []
        wrong += [f"{name}: /health took {health:.1f} s"] if health > MOST_HEALTH else []
        wrong += [f"{name}: {memory - before} MB more"] if memory - before > MOST_MB else []
        wrong += (
            [f"{name}: {came}"]
            if any(word.startswith("5") and word != "503" for word in came.split())
            else []
        )
    ended = server.stop()
    wrong += [f"SIGTERM took {ended:.0f} s"] if ended > 30 else []
    columns = ["attack", "came of it", "longest wait", "told 503", "/health", "memory"]
    note = f"The queue says {WORST} s at most; SIGTERM ended the server after {ended:.1f} s."
    print_table("A server under attack", columns, rows, left=2, note=note)
    print(*(f"not held: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
