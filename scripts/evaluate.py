"""`dbrx-quant eval`: how far a quantized model is from its original, on a text."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.scripts.output import counter, hush_loading, print_json, print_table, seconds_text
from dbrx_quant.scripts.verb import UsageError, Verb, add_quiet_argument, positive

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="a quantized folder, or its id on the Hub")
    parser.add_argument("--reference", metavar="MODEL", help="the original's folder, or its id on the Hub")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the original's log-probabilities here, so that the two models are not in memory together; "
        "filled from --reference, and enough without it later",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--windows", type=positive, default=40, help="(default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens a window (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the scores."""
    if not arguments.reference and not arguments.cache:
        raise UsageError("no original to compare with: give --reference MODEL, or a --cache filled before")
    from dbrx_quant.runtime.evaluate import evaluate, windows
    from dbrx_quant.runtime.inspect import inspect_folder
    from dbrx_quant.runtime.loader import find_folder, load_model

    started = time.monotonic()
    hush_loading(arguments.quiet)
    folder = find_folder(arguments.folder, None)
    facts = inspect_folder(folder)
    rows = windows(folder, arguments.text, arguments.windows, arguments.length)
    reference = _reference(arguments, rows)
    candidate = load_model(folder, device=arguments.device)
    with counter("evaluate", "window", arguments.quiet) as progress:
        scores = evaluate(candidate, reference, rows, progress)
    routed = scores.router_topk
    result = {
        **scores.as_dict(),
        "router_topk": sum(routed) / len(routed) if routed else None,
        "router_topk_blocks": list(routed) if routed else None,
        "bpw": facts.bpw,
        "head_bpw": facts.head_bpw,
        "total_bytes": facts.total_bytes,
        "seconds": time.monotonic() - started,
    }
    print_json(result) if arguments.json else _print_scores(arguments, result)
    return 0


def _reference(arguments: argparse.Namespace, rows: "Tensor") -> Any:
    """The original, or the cache of what it says."""
    from dbrx_quant.runtime.evaluate import ReferenceCache, cache_reference
    from dbrx_quant.runtime.loader import load_dense

    if not arguments.reference:
        return ReferenceCache(arguments.cache)
    original = load_dense(arguments.reference).to(arguments.device)
    if not arguments.cache:
        return original
    with counter("original", "window", arguments.quiet) as progress:
        return cache_reference(original, rows, arguments.cache, progress=progress)


def _print_scores(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    error, routed = result["kl_stderr"], result["router_topk"]
    print_table(
        f"{arguments.folder} on {arguments.windows} windows of {arguments.length} tokens",
        ["bpw", "perplexity", "original's", "KL divergence", "same top token", "same experts", "time"],
        [
            [
                f"{result['bpw']:.4f}",
                f"{result['ppl']:.3f}",
                f"{result['reference_ppl']:.3f}",
                f"{result['kl']:.5f}" + (f" ± {error:.5f}" if error is not None else ""),
                f"{100 * result['top1']:.2f} %",
                f"{100 * routed:.2f} %" if routed is not None else "-",
                seconds_text(result["seconds"]),
            ]
        ],
        left=0,
    )


VERB = Verb(
    "eval",
    "compare a quantized folder with its original: perplexity, KL divergence, top token, experts",
    "dbrx-quant eval out/dbrx --reference models/dbrx-instruct --text wiki.txt --windows 40 --length 512",
    add_arguments,
    run,
)
