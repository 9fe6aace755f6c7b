"""`dbrx-quant serve`: an OpenAI-compatible server for a quantized model."""

import argparse
import ipaddress
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from dbrx_quant.runtime.output.redact import hide
from dbrx_quant.scripts.terminal.arguments import (
    add_device_argument,
    add_gpu_memory_argument,
    add_memory_argument,
    add_model_argument,
    add_quiet_argument,
    find_model,
    gpu_memory,
    natural,
    positive,
)
from dbrx_quant.scripts.terminal.output import hide_loading_bar, model_title, print_json, say
from dbrx_quant.scripts.terminal.verb import UsageError, Verb

API_KEY = "DBRXQ_API_KEY"
_STOP_SECONDS = 3
_KILL_SECONDS = 20
_MOST_KEY = 4096
_QUEUE, _SECONDS = 64, 600
_OWN, _VLLM = "dbrx-quant", "vllm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name, or the id)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the key that clients must send (default: ${API_KEY}, or nothing); other users can see it here",
    )
    keys.add_argument("--api-key-file", metavar="FILE", help="a file with that key, which only you can read")
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name that clients reach this server by, beside addresses and names without a dot; "
        "* allows all",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--context", metavar="TOKENS", type=positive, help="of prompt and answer (default: the model's)"
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=natural,
        default=_QUEUE,
        help="requests that may wait for one that is answered; more get 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        default=_SECONDS,
        help="for one answer; it is cut off there (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=(_OWN, _VLLM),
        default=_OWN,
        help="who answers: this program, one request at a time, or vLLM, many at once (default: %(default)s)",
    )
    parser.add_argument(
        "--vllm-options",
        metavar="OPTIONS",
        default="",
        help="for vLLM's server, such as '--tensor-parallel-size 2'; one word needs a =: --vllm-options=--x",
    )
    add_memory_argument(parser)
    add_gpu_memory_argument(parser)
    add_quiet_argument(parser)


def port(text: str) -> int:
    """A number from 0 to 65535."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 65535")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if arguments.engine == _VLLM:
        _become_vllm(arguments)
    if arguments.vllm_options:
        raise UsageError("--vllm-options: only with --engine vllm")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("serving needs fastapi, uvicorn and openai: pip install 'dbrx-quant[serve]'")
    key = api_key(arguments)
    listening = _bind(arguments.host, arguments.port)  # before the model is loaded, which may take minutes
    with listening:
        hide_loading_bar(arguments.quiet)
        folder = find_model(arguments.folder, arguments)
        name = arguments.name or model_title(arguments.folder)
        try:
            from dbrx_quant.runtime.talk.server import Limits, build_app
        except ImportError as error:
            import transformers

            raise ImportError(
                f"the server of transformers {transformers.__version__} is another than this was made for "
                f"({error}); transformers 5.23 is known to work"
            ) from error
        hide(key)
        if key is None and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
            say("warning: everyone who can reach this machine can use the model; --api-key-file sets a key")
        limits = Limits(arguments.queue, arguments.timeout, arguments.context)
        hosts = [arguments.host, *arguments.allow_host]
        memory, gpu = arguments.memory, gpu_memory(arguments, arguments.context)
        device = arguments.device
        app = build_app(folder, name, device, key, hosts, limits, memory=memory, gpu_memory=gpu, notify=say)
        host, number = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{number}/v1"

        def announce() -> None:
            if arguments.json:
                print_json({"url": url, "model": name})
            else:
                print(f"{name} is served at {url}; Ctrl-C stops it. Try\n  {example(url, name, key)}")
            sys.stdout.flush()

        try:
            _serve(app, listening, announce, arguments.quiet)
        except KeyboardInterrupt:
            say("stopped")
    return 0


def _become_vllm(arguments: argparse.Namespace) -> NoReturn:
    """Replace this process by vLLM's server, once the folder is found sound.

    Raises:
        UsageError: an option has no counterpart there.
        ImportError: vLLM is not installed.
        CheckpointError: vLLM cannot run the folder.
    """
    given = {
        "--device": arguments.device != "cpu",
        "--queue": arguments.queue != _QUEUE,
        "--timeout": arguments.timeout != _SECONDS,
        "--allow-host": bool(arguments.allow_host),
        "--memory": arguments.memory is not None,
        "--json": arguments.json,
    }
    if unknown := [option for option, there in given.items() if there]:
        raise UsageError(f"{unknown[0]}: vLLM has nothing like it; leave it out, or see --vllm-options")
    from dbrx_quant.runtime.vllm.command import require_vllm, server_command, server_environment

    require_vllm()
    import torch

    from dbrx_quant.runtime.vllm.opening import open_folder

    key = api_key(arguments)
    with _bind(arguments.host, arguments.port) as free:
        number = free.getsockname()[1]
    folder = find_model(arguments.folder, arguments)
    open_folder(folder)
    command = server_command(
        folder,
        name=arguments.name or model_title(arguments.folder),
        host=arguments.host,
        port=number,
        context=arguments.context,
        on_cpu=torch.version.cuda is None,
        options=arguments.vllm_options,
    )
    os.execve(command[0], command, server_environment(os.environ, key))


def example(url: str, name: str, api_key: str | None) -> str:
    """A command line that sends the server a request."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = f' -H "Authorization: Bearer ${API_KEY}"' if api_key else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def api_key(arguments: argparse.Namespace) -> str | None:
    """The key that clients must send, if any.

    Raises:
        OSError: its file cannot be read.
        ValueError: it is nothing that a client can send.
    """
    path = arguments.api_key_file
    key = arguments.api_key or os.environ.get(API_KEY) or None
    if path is not None:
        with open(path, encoding="ascii", errors="replace") as file:
            key = file.read(_MOST_KEY + 1).strip()
    if key is not None and not (
        key.isascii() and key.isprintable() and " " not in key and 0 < len(key) <= _MOST_KEY
    ):
        raise ValueError(
            f"{path or 'the API key'}: a key is 1 to {_MOST_KEY} letters, digits and signs, without spaces"
        )
    return key


def _bind(host: str, number: int) -> socket.socket:
    """A socket on that address that takes no connections yet.

    Raises:
        OSError: the address is in use or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a client that vanished is noticed
        made.bind((host, number))
    except OSError as error:
        made.close()
        raise OSError(
            f"cannot listen on {host}:{number}: {error.strerror or error}; see --host, --port"
        ) from error
    return made


def _serve(app: Any, listening: socket.socket, announce: Callable[[], None], quiet: bool) -> None:
    """Serve on a bound socket until a signal comes; `announce` is called when connections are taken."""
    import copy

    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    from dbrx_quant.runtime.talk.connections import Connection

    logging = copy.deepcopy(LOGGING_CONFIG)
    logging["handlers"]["access"]["stream"] = "ext://sys.stderr"

    class Server(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            announce()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            killer = threading.Timer(_KILL_SECONDS, os._exit, (75,))  # whatever the rest is waiting for
            killer.daemon = True
            killer.start()

    config = uvicorn.Config(
        app,
        log_level="warning" if quiet else "info",
        log_config=logging,
        access_log=not quiet,
        timeout_graceful_shutdown=_STOP_SECONDS,
        http=Connection,
        ws="none",
    )
    Server(config).run(sockets=[listening])


VERB = Verb(
    "serve",
    "serve a model to OpenAI's clients",
    "dbrx-quant serve out/dbrx --port 8000",
    add_arguments,
    run,
)
