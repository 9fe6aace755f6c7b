"""vLLM's server, started by our command on a free port, and requests to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

from vllm_tokens import vllm_environment

NAME = "served"
_READY_SECONDS = 900
_COMPACT = '--structured-outputs-config \'{"backend": "xgrammar", "disable_any_whitespace": true}\''
OPTIONS = f"--enforce-eager --max-model-len 256 {_COMPACT}"  # a small model would write spaces for ever


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(folder, log, port, options=OPTIONS):
    """The running process; it is asked to end at the end, if it has not."""
    command = [sys.executable, "-m", "dbrx_quant.scripts.cli.main", "serve", str(folder), "--engine", "vllm"]
    command += ["--name", NAME, "--port", str(port), "--vllm-options", options]
    with log.open("a") as out:
        process = subprocess.Popen(
            command, env=vllm_environment(), stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_until_ready(process, port, log)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        with suppress(ProcessLookupError):  # the engine outlives a server that was killed
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process, port, log):
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-6000:])


def post(port, path, **body):
    """The answer to a request, as JSON."""
    with open_request(port, path, body) as answer:
        return json.load(answer)


def stream(port, path, **body):
    """The texts of a streamed completion, in the order of their arrival, and its last finish reason."""
    pieces, reason = [], None
    with open_request(port, path, body | {"stream": True}) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                pieces.append(choice["text"])
                reason = choice["finish_reason"] or reason
    return pieces, reason


def open_request(port, path, body):
    data = json.dumps({"model": NAME} | body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=300)
