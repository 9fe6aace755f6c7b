"""`dbrx-quant tokenizer`: check and repair the extra tokens of a model folder."""

import argparse

from dbrx_quant.scripts.terminal.arguments import add_model_argument, find_model, local_folder
from dbrx_quant.scripts.terminal.output import print_json, say
from dbrx_quant.scripts.terminal.verb import Verb

CHECK_FAILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(
        parser, "a model folder, quantized or not; for --check and --dry-run also its id on the Hub"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="change nothing; print one line per fault, exit with 3 if any"
    )
    what.add_argument("--dry-run", action="store_true", help="show what would be changed, change nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check or repair; 3 where something is wrong (that is, or stays)."""
    from dbrx_quant.runtime.tokenizer.repair import apply_repair, check_folder, plan_repair

    changing = not (arguments.check or arguments.dry_run)
    given = arguments.folder
    folder = local_folder(given, "tokenizer") if changing else find_model(given, arguments)
    if arguments.check:
        faults = [str(problem) for problem in check_folder(folder)]
        if arguments.json:
            print_json({"ok": not faults, "faults": faults})
        else:
            print("\n".join(faults) or f"{folder}: sound: every token has its id, and chat turns end")
        return CHECK_FAILED if faults else 0

    repair = plan_repair(folder)
    kept = None if arguments.dry_run else apply_repair(folder, repair)
    remaining = [str(problem) for problem in repair.remaining]
    if arguments.json:
        print_json(
            {
                "ok": not remaining,
                "faults": [str(problem) for problem in repair.problems],
                "changes": list(repair.changes),
                "files": list(repair.files),
                "kept": kept and str(kept),
                "remaining": remaining,
                "dry_run": arguments.dry_run,
            }
        )
        return CHECK_FAILED if remaining else 0
    for change in repair.changes:
        print(change)
    if not repair.files:
        print(f"{folder}: " + ("no repairable fault" if remaining else "nothing to repair"))
    elif arguments.dry_run:
        print(f"{folder}: would write {', '.join(repair.files)}")
    else:
        print(
            f"{folder}: wrote {', '.join(repair.files)}"
            + (f"; the original files are in {kept.name}/" if kept else "")
        )
    for fault in remaining:
        say(f"still wrong: {fault}")
    return CHECK_FAILED if remaining else 0


VERB = Verb(
    "tokenizer",
    "check and repair the extra tokens of a model folder",
    "dbrx-quant tokenizer out/dbrx --check",
    add_arguments,
    run,
)
