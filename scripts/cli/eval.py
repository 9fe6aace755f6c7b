"""`dbrx-quant eval`: how far a quantized model is from its original, on a text.

What it finds is kept in the folder's `evaluation.json`, where `report` and the model card read it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.progress import counter
from dbrx_quant.scripts.evaluation.original import original_of
from dbrx_quant.scripts.terminal.arguments import add_model_argument, add_quiet_argument, find_model, positive
from dbrx_quant.scripts.terminal.output import (
    hide_loading_bar,
    print_json,
    print_table,
    say,
    seconds_text,
)
from dbrx_quant.scripts.terminal.verb import UsageError, Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the original's folder, or its id on the Hub")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the original's log-probabilities here, so that the two models are never loaded together; "
        "filled from --reference, and enough without it later",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--windows", type=positive, default=40, help="(default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens a window (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--no-save", action="store_true", help="leave DIR/evaluation.json unchanged")
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the scores and keep them in the folder."""
    if not arguments.reference and not arguments.cache:
        raise UsageError("no original to compare with: give --reference MODEL, or a filled --cache")
    from dbrx_quant.runtime.evaluation.record import read_evaluations
    from dbrx_quant.runtime.evaluation.scores import evaluate, windows
    from dbrx_quant.runtime.files.atomic import check_place
    from dbrx_quant.runtime.folder.inspect import inspect_folder
    from dbrx_quant.runtime.model.load import load_model

    started = time.monotonic()
    if arguments.cache and arguments.reference:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        check_place(arguments.cache / "window")
    elif arguments.cache and not arguments.cache.is_dir():
        raise ValueError(f"{arguments.cache}: no such folder; fill it with --reference MODEL")
    hide_loading_bar(arguments.quiet)
    folder = find_model(arguments.folder, arguments)
    facts = inspect_folder(folder)
    save = not arguments.no_save
    if save:
        read_evaluations(folder)  # a damaged file is found before the work, not after it
    rows = windows(folder, arguments.text, arguments.windows, arguments.length)
    reference = original_of(arguments, rows, folder)
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
    if save:
        _save(arguments, folder, result)
    return 0


def _save(arguments: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Save the scores in the folder, or say on stderr why not: they are printed, so nothing is lost."""
    from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME, save_evaluation

    if not Path(arguments.folder).is_dir() or _in_hub_cache(folder):
        say(f"not saved: {arguments.folder} is in the Hub's cache, where nothing else should be written")
        return
    same = ("ppl", "kl", "kl_stderr", "top1", "router_topk", "bpw")
    entry = {name: result[name] for name in same} | {
        "text": arguments.text.name,
        "windows": arguments.windows,
        "length": arguments.length,
        "tokens": result["positions"],
        "ppl_original": result["reference_ppl"],
    }
    try:
        save_evaluation(folder, entry)
    except OSError as error:
        say(f"not saved: {folder / EVALUATION_NAME}: {error.strerror or error}")
    except ValueError as error:
        say(f"not saved: {error}")


def _in_hub_cache(folder: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return folder.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())


def _print_scores(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    from dbrx_quant.runtime.evaluation.record import ppl_text

    error, routed = result["kl_stderr"], result["router_topk"]
    print_table(
        f"{arguments.folder} on {arguments.windows} windows of {arguments.length} tokens",
        ["bpw", "perplexity", "original's", "KL divergence", "same top token", "same experts", "time"],
        [
            [
                f"{result['bpw']:.4f}",
                ppl_text(result["ppl"]),
                ppl_text(result["reference_ppl"]),
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
