"""`dbrx-quant generate`: text from a quantized folder."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

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
from dbrx_quant.scripts.terminal.output import hide_loading_bar, print_json, say
from dbrx_quant.scripts.terminal.verb import Verb

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 picks the most likely token (default: 0)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's turn in a chat")
    add_device_argument(parser)
    add_memory_argument(parser)
    add_gpu_memory_argument(parser)
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate; the text appears as it is made, and stays when Ctrl-C ends it."""
    import torch

    from dbrx_quant.runtime.files.text import unicode_fault
    from dbrx_quant.runtime.model.load import load_model
    from dbrx_quant.runtime.talk.conversation import end_ids, sampling
    from dbrx_quant.runtime.talk.text_stream import TextStream
    from dbrx_quant.runtime.tokenizer.load import load_tokenizer, longest_sequence

    hide_loading_bar(arguments.quiet)
    folder = find_model(arguments.folder, arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if fault := unicode_fault(prompt):
        raise ValueError(f"the prompt is {fault}")
    tokenizer = load_tokenizer(folder)
    ids = _encode(tokenizer, prompt, arguments.chat)
    context = longest_sequence(folder)
    room = arguments.max_new_tokens if context is None else context - ids.shape[1]
    most = min(arguments.max_new_tokens, room)
    if most < 1:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, the model takes {context} with the answer; shorten it"
        )
    gpu = gpu_memory(arguments, ids.shape[1] + most)
    model = load_model(folder, device=arguments.device, memory=arguments.memory, gpu_memory=gpu, notify=say)
    torch.manual_seed(arguments.seed)
    stream = TextStream(tokenizer, (lambda piece: None) if arguments.json else _write)
    interrupted = False
    started = time.monotonic()
    try:
        model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=most,
            streamer=stream,
            **sampling(arguments.temperature),
        )
    except KeyboardInterrupt:
        interrupted = True
        stream.end()
    seconds = time.monotonic() - started
    ended = bool(stream.ids) and stream.ids[-1] in end_ids(model)
    cut = "context" if most < arguments.max_new_tokens else "length"
    if arguments.json:
        print_json(
            {
                "prompt": prompt,
                "text": stream.text,
                "prompt_tokens": ids.shape[1],
                "new_tokens": len(stream.ids),
                "stopped": "interrupted" if interrupted else "end of text" if ended else cut,
                "seconds": seconds,
                "tokens_per_second": len(stream.ids) / seconds,
            }
        )
    else:
        _write("\n")
    if interrupted:
        raise KeyboardInterrupt
    if cut == "context" and not ended:
        say(f"cut off: the model takes {context} tokens, prompt and answer together")
    return 0


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _encode(tokenizer: Any, prompt: str, chat: bool) -> "Tensor":
    """Ids [1, T] of a text, or of a user's turn with the opening of the answer.

    Raises:
        ValueError: the prompt is empty, or the model has no chat template.
        CheckpointError: its template cannot be rendered.
    """
    import torch

    from dbrx_quant.runtime.tokenizer.template import chat_ids

    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this model has no chat template; leave out --chat")
        ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": prompt}])])
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    return ids


VERB = Verb(
    "generate",
    "continue a text, or answer with --chat",
    'dbrx-quant generate out/dbrx "What is a mixture of experts?" --chat --max-new-tokens 200',
    add_arguments,
    run,
)
