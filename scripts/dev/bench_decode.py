"""How fast a small model decodes on the CPU, and where the time of a token goes.

    python -m dbrx_quant.scripts.dev.bench_decode DIR [--threads N] [--tokens N] [--dtype NAME] [--json]
        [--record DIR]

Runs transformers' `generate` (greedy, no end of text) on a quantized folder in turns with and without
native steps, with 1 and 2 threads by default, and counts the fastest run of each. Further runs
with native steps are timed from inside: the native call, the head, our Python around them, and the rest,
which is transformers'. Beside it stands what reading the active weights takes at the memory's speed.
llama.cpp's figure to set beside these comes from `llama-bench -m MODEL.gguf -t N -p 0 -n 128`.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.model.linear import QuantLinear
from dbrx_quant.runtime.step.layers import layer_parts
from dbrx_quant.runtime.step.native_step import use_native_step
from dbrx_quant.scripts.dev.bench_record import add_record_argument, record
from dbrx_quant.scripts.terminal.output import print_json, print_table, quiet_on_closed_pipe

PROMPT = torch.arange(1, 17)[None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def active_bytes(model: Any) -> int:
    """Stored bytes of the quantized linears that one token needs.

    Raises:
        ValueError: the model has no native steps.
    """

    def size(module: torch.nn.Module | None) -> int:
        linears = [] if module is None else [m for m in module.modules() if type(m) is QuantLinear]
        return sum(tensor.nbytes for linear in linears for tensor in linear.stored())

    found = layer_parts(model.base_model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__}: its layers do not run natively, at least not in this setup"
        )
    total = size(model.get_output_embeddings())
    for part in found[0]:
        total += sum(map(size, (*part.qkv, part.output, *(part.mlp or ()))))
        if part.experts is not None:
            total += size(part.experts) * part.active // part.experts.num_experts
    return total


def read_seconds(count: int, runs: int = 20) -> float:
    """The fastest reading of so many bytes, with all threads, from memory that no cache holds."""
    chunk = (count + 127) // 128 * 128
    memory = torch.zeros(max(chunk, 220_000_000 // chunk * chunk), dtype=torch.uint8)
    fastest, total = float("inf"), ctypes.c_uint64()
    places = range(0, memory.numel() - chunk + 1, chunk)
    for run in range(runs):
        place = memory.data_ptr() + places[run % len(places)]
        start = time.perf_counter()
        _native.check(_native.library().dbrxq_read_memory(place, chunk, ctypes.byref(total)), "read")
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of calls of `owner.name` to `seconds[name]` inside the block."""
    function: Callable[..., Any] = getattr(owner, name)
    own = name in vars(owner)
    seconds[name] = 0.0

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def generate_seconds(model: Any, tokens: int) -> float:
    """Seconds of generating `tokens` tokens, the prompt included."""
    start = time.perf_counter()
    output = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=tokens, do_sample=False
    )
    assert output.shape[1] == PROMPT.shape[1] + tokens
    return time.perf_counter() - start


def measure(model: Any, threads: int, tokens: int, runs: int) -> dict[str, Any]:
    """The figures for one number of threads; milliseconds are of one token."""
    torch.set_num_threads(threads)
    weights = active_bytes(model)
    fastest = {True: float("inf"), False: float("inf")}
    for run in range(runs + 1):
        for native in fastest:
            with use_native_step(native):
                seconds = generate_seconds(model, tokens)
            if run:  # the first repacks the weights
                fastest[native] = min(fastest[native], seconds)
    parts: dict[str, float] = {}
    for _ in range(runs):
        seconds_of: dict[str, float] = {}
        library, decoder, head = _native.library(), model.base_model, model.get_output_embeddings()
        with (
            timed(library, "dbrxq_decode", seconds_of),
            timed(decoder.forward, "_step", seconds_of),
            timed(head, "forward", seconds_of),
        ):
            total = generate_seconds(model, tokens)
        if not parts or total < parts["total"]:
            parts = {
                "total": total,
                "layers": seconds_of["dbrxq_decode"],
                "head": seconds_of["forward"],
                "python": seconds_of["_step"] - seconds_of["dbrxq_decode"],
            }
    if not parts["layers"]:
        raise ValueError("no native step ran; see dbrx_quant.runtime.step.native_step for what it needs")
    milliseconds = {name: 1e3 * seconds / tokens for name, seconds in parts.items()}
    milliseconds["transformers"] = 2 * milliseconds["total"] - sum(milliseconds.values())
    return {
        "threads": threads,
        "tokens_per_s": tokens / fastest[True],
        "tokens_per_s_ordinary": tokens / fastest[False],
        "ms": milliseconds,
        "reading_weights_ms": 1e3 * read_seconds(weights),
    }


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    names = ("total", "layers", "head", "python", "transformers")
    rows = [
        [
            f"{r['threads']}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['tokens_per_s_ordinary']:.0f}",
            *(f"{r['ms'][name]:.2f}" for name in names),
            f"{r['reading_weights_ms']:.2f}",
        ]
        for r in report["decode"]
    ]
    heads = ["threads", "tokens/s", "without native steps", "ms a token", "layers", "head", "our Python"]
    print_table(
        f"{report['tokens']} tokens, {report['dtype']}, {report['isa']}",
        [*heads, "transformers", "reading the weights"],
        rows,
    )


@quiet_on_closed_pipe
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="a quantized folder")
    parser.add_argument("--threads", type=int, help="measure with this many only (default: 1 and 2)")
    parser.add_argument("--tokens", type=int, default=128, help="to generate (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    model = load_model(arguments.folder, dtype=_DTYPES[arguments.dtype])
    model.generation_config.eos_token_id = None
    threads = [arguments.threads] if arguments.threads else [1, 2]
    decode = [measure(model, count, arguments.tokens, arguments.runs) for count in threads]
    report = {
        "decode": decode,
        "dtype": arguments.dtype,
        "isa": _native.isa(),
        "tokens": arguments.tokens,
    }
    record("decode", arguments, report)
    if arguments.json:
        print_json(report)
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
