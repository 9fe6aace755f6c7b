"""`dbrx-quant eval`: how far a quantized model is from its original on a text, and how it does at tasks.

What it finds is kept in the folder's `evaluation.json`, where `report` and the model card read it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.output.progress import counter
from dbrx_quant.scripts.evaluation.original import original_of
from dbrx_quant.scripts.evaluation.tasks import beside, original_scores, print_tasks, settings_of
from dbrx_quant.scripts.terminal.arguments import (
    add_device_argument,
    add_gpu_memory_argument,
    add_model_argument,
    add_quiet_argument,
    find_model,
    gpu_memory,
    natural,
    positive,
)
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
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original's folder, or its id on the Hub; it goes through the text a block at a time",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the original's log-probabilities here; filled from --reference, enough without it later, "
        "and where an interrupted run goes on",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--windows", type=positive, default=40, help="(default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens a window (default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument("--no-save", action="store_true", help="leave DIR/evaluation.json unchanged")
    add_gpu_memory_argument(parser)
    add_quiet_argument(parser)
    tasks = parser.add_argument_group("tasks of lm-eval (pip install 'dbrx-quant[tasks]')")
    tasks.add_argument("--tasks", type=_names, metavar="A,B", help="tasks, groups or tags by name")
    tasks.add_argument(
        "--tasks-path", type=Path, metavar="DIR", help="task files (YAML) beside those that lm-eval brings"
    )
    tasks.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    tasks.add_argument(
        "--fewshot", type=natural, metavar="N", help="examples before each question (default: the task's)"
    )
    tasks.add_argument("--seed", type=natural, default=1234, help="of what is drawn (default: %(default)s)")
    tasks.add_argument("--batch", type=positive, default=1, help="sequences at a time (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print what was found and keep it in the folder."""
    _check_usage(arguments)
    from dbrx_quant.runtime.evaluation.record import read_evaluations
    from dbrx_quant.runtime.folder.inspect import inspect_folder
    from dbrx_quant.runtime.model.load import load_model
    from dbrx_quant.runtime.model.placement import find_devices

    find_devices(arguments.device)  # before the original is loaded, which takes minutes
    started = time.monotonic()
    _prepare_cache(arguments)
    hide_loading_bar(arguments.quiet)
    folder = find_model(arguments.folder, arguments)
    facts = inspect_folder(folder)
    if not arguments.no_save:
        read_evaluations(folder)  # a damaged file is found before the work, not after it
    compare = _comparison(arguments, folder) if arguments.text else None
    judge = _judge(arguments, folder, facts.bpw) if arguments.tasks else None
    gpu = gpu_memory(arguments, arguments.length, arguments.length)
    model = load_model(folder, device=arguments.device, gpu_memory=gpu, notify=say)
    result = compare(model) if compare else {}
    result |= {"bpw": facts.bpw, "head_bpw": facts.head_bpw, "total_bytes": facts.total_bytes}
    if judge:
        result["tasks"] = judge(model)
    result["seconds"] = time.monotonic() - started
    _print(arguments, folder, result)
    if not arguments.no_save:
        _save(arguments, folder, result)
    return 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names, each once, as in hellaswag,mmlu")
    return names


def _check_usage(arguments: argparse.Namespace) -> None:
    if not arguments.text and not arguments.tasks:
        raise UsageError("nothing to evaluate on: give --text FILE, --tasks NAMES, or both")
    if arguments.text and not arguments.reference and not arguments.cache:
        raise UsageError("no original to compare with: give --reference MODEL, or a filled --cache")
    if arguments.tasks_path and not arguments.tasks:
        raise UsageError("--tasks-path without --tasks: name the tasks that are to be run")


def _prepare_cache(arguments: argparse.Namespace) -> None:
    from dbrx_quant.runtime.files.atomic import check_place

    if arguments.cache and arguments.reference:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        check_place(arguments.cache / "window")
    elif arguments.cache and not arguments.cache.is_dir():
        raise ValueError(f"{arguments.cache}: no such folder; fill it with --reference MODEL")


def _comparison(arguments: argparse.Namespace, folder: Path) -> Any:
    """A function of the quantized model that gives its scores on the text; the original's are there."""
    from dbrx_quant.runtime.evaluation.scores import evaluate, windows

    rows = windows(folder, arguments.text, arguments.windows, arguments.length)
    reference = original_of(arguments, rows, folder)

    def compare(model: Any) -> dict[str, Any]:
        with counter("evaluate", "window", arguments.quiet) as progress:
            scores = evaluate(model, reference, rows, progress)
        routed = scores.router_topk
        return {
            **scores.as_dict(),
            "router_topk": sum(routed) / len(routed) if routed else None,
            "router_topk_blocks": list(routed) if routed else None,
        }

    return compare


def _judge(arguments: argparse.Namespace, folder: Path, bpw: float) -> Any:
    """A function of the quantized model that gives its scores at the tasks; the original has done them."""
    from dbrx_quant.runtime.evaluation.tasks import open_tasks, run_tasks
    from dbrx_quant.runtime.tokenizer.load import load_tokenizer

    tasks = open_tasks(settings_of(arguments), arguments.quiet)
    tokenizer = load_tokenizer(folder)
    originals = original_scores(arguments, tasks, tokenizer)

    def judge(model: Any) -> list[dict[str, Any]]:
        return beside(run_tasks(tasks, model, tokenizer, arguments.quiet), originals, bpw)

    return judge


def _save(arguments: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Save what was found in the folder, or say on stderr why not: it is printed, so nothing is lost."""
    from dbrx_quant.runtime.evaluation.record import EVALUATION_NAME, save_evaluation, save_task_scores

    if not Path(arguments.folder).is_dir() or _in_hub_cache(folder):
        say(f"not saved: {arguments.folder} is in the Hub's cache, where nothing else should be written")
        return
    try:
        if arguments.text:
            save_evaluation(folder, _entry(arguments, result))
        if arguments.tasks:
            save_task_scores(folder, result["tasks"])
    except OSError as error:
        say(f"not saved: {folder / EVALUATION_NAME}: {error.strerror or error}")
    except ValueError as error:
        say(f"not saved: {error}")


def _entry(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    same = ("ppl", "kl", "kl_stderr", "top1", "router_topk", "bpw")
    return {name: result[name] for name in same} | {
        "text": arguments.text.name,
        "windows": arguments.windows,
        "length": arguments.length,
        "tokens": result["positions"],
        "ppl_original": result["reference_ppl"],
    }


def _in_hub_cache(folder: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return folder.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())


def _print(arguments: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    if arguments.json:
        print_json(result)
        return
    if arguments.text:
        title = f"{arguments.folder} on {arguments.windows} windows of {arguments.length} tokens"
        print_table(title, *_scores_table(result), left=0)
    if arguments.tasks:
        print_tasks(f"{arguments.folder} at tasks", result["tasks"], folder)


def _scores_table(result: dict[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    from dbrx_quant.runtime.evaluation.record import ppl_text

    error, routed = result["kl_stderr"], result["router_topk"]
    columns = ["bpw", "perplexity", "original's", "KL divergence", "same top token", "same experts", "time"]
    return columns, [
        [
            f"{result['bpw']:.4f}",
            ppl_text(result["ppl"]),
            ppl_text(result["reference_ppl"]),
            f"{result['kl']:.5f}" + (f" ± {error:.5f}" if error is not None else ""),
            f"{100 * result['top1']:.2f} %",
            f"{100 * routed:.2f} %" if routed is not None else "-",
            seconds_text(result["seconds"]),
        ]
    ]


VERB = Verb(
    "eval",
    "compare a quantized folder with its original: perplexity, KL divergence, top token, experts, tasks",
    "dbrx-quant eval out/dbrx --reference models/dbrx-instruct --text wiki.txt --windows 40 --length 512\n"
    "  dbrx-quant eval out/dbrx --tasks hellaswag,mmlu --limit 100 --fewshot 5",
    add_arguments,
    run,
)
