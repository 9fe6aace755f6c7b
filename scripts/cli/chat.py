"""`dbrx-quant chat`: talk to a quantized model in the terminal."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

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
    temperature,
)
from dbrx_quant.scripts.terminal.chat_screen import PlainScreen, TerminalScreen
from dbrx_quant.scripts.terminal.chat_session import Screen, Session
from dbrx_quant.scripts.terminal.output import hide_loading_bar, model_title, print_json, say, stdout_console
from dbrx_quant.scripts.terminal.verb import Verb

_PROMPT = "\001\033[1;36m\002> \001\033[0m\002"  # \001 … \002: no columns, for readline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.7,
        help="0 picks the most likely token (default: %(default)s)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of sampling (default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument("--plain", action="store_true", help="show answers as plain text, not as Markdown")
    add_memory_argument(parser)
    add_gpu_memory_argument(parser)
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends."""
    import torch

    from dbrx_quant.runtime.files.text import unicode_fault
    from dbrx_quant.runtime.model.load import load_model
    from dbrx_quant.runtime.talk.conversation import Conversation
    from dbrx_quant.runtime.tokenizer.load import load_tokenizer

    folder = find_model(arguments.folder, arguments)
    if fault := unicode_fault(arguments.system or ""):
        raise ValueError(f"--system is {fault}")
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: no chat template; 'dbrx-quant generate' continues a text")
    typed = sys.stdin.isatty() and sys.stdout.isatty() and not arguments.json
    hide_loading_bar(arguments.quiet or typed)
    gpu = gpu_memory(arguments)
    model = load_model(folder, device=arguments.device, memory=arguments.memory, gpu_memory=gpu, notify=say)
    torch.manual_seed(arguments.seed)
    conversation = Conversation(
        model,
        tokenizer,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    screen: Screen
    if typed:
        screen = TerminalScreen(stdout_console(highlight=False), markdown=not arguments.plain)
        screen.note(_greeting(arguments.folder, model, conversation.context))
    else:
        screen = PlainScreen(answers=not arguments.json)
    session = Session(conversation, screen)
    for line in _typed_lines(screen) if typed else _piped_lines():
        if not session.handle(line):
            break
        if not typed and session.answers and session.answers[-1].stopped == "interrupted":
            raise KeyboardInterrupt  # nobody is there to go on
    if arguments.json:
        print_json(_as_json(session))
    return 0


def _greeting(source: str, model: Any, context: int | None) -> str:
    quantization = getattr(model.config, "quantization_config", None)
    bits = getattr(quantization, "bits", None)
    parts = [model_title(source)]
    parts += [f"{bits:g} bits per weight"] if bits else []
    parts += [f"{context} tokens of context"] if context else []
    return f"{', '.join(parts)}\n/help shows the commands, Ctrl-D leaves"


def _typed_lines(screen: Screen) -> Iterator[str]:
    """Lines from the keyboard, with history and editing; those that end with a backslash are joined."""
    import readline  # noqa: F401  # importing it is what gives input() its editing

    parts: list[str] = []
    while True:
        if not parts:
            print()
        try:
            line = input("… " if parts else _PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            parts = []
            print()
            screen.note("Ctrl-D or /quit leaves")
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []


def _piped_lines() -> Iterator[str]:
    """Lines from a pipe or file, each a message or a command."""
    for line in sys.stdin:
        yield line.rstrip("\n")


def _as_json(session: Session) -> dict[str, Any]:
    """The conversation and its answers, for --json."""
    return {
        "messages": session.conversation.all_messages(),
        "answers": [
            {**vars(answer), "tokens_per_second": answer.tokens_per_second} for answer in session.answers
        ],
    }


VERB = Verb(
    "chat",
    "talk to a model in the terminal",
    'dbrx-quant chat out/dbrx --system "Answer in one sentence."',
    add_arguments,
    run,
)
