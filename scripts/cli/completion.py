"""`dbrx-quant completion`: the script that makes a shell complete verbs, options and files.

The script is made from the parser by shtab, once: nothing of ours runs while somebody types.
"""

import argparse

from dbrx_quant.scripts.terminal.output import print_json
from dbrx_quant.scripts.terminal.verb import Verb

SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("DIR", "FOLDER", "MODEL", "OUT")  # metavars: what the argument is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    script = completion_script(arguments.parser, arguments.shell)
    print_json({"shell": arguments.shell, "script": script}) if arguments.json else print(script)
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of SHELLS; bash and fish source it, zsh expects it as `_dbrx-quant` in its fpath.

    Args:
        parser: of the whole command.
        shell: whose.
    """
    import shtab

    for part in _with_verbs(parser):
        for action in part._actions:
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # where shtab looks for it
            elif action.metavar and "FILE" in action.metavar:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


def _with_verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its verbs."""
    verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(part for action in verbs for part in action.choices.values())]


VERB = Verb(
    "completion",
    "print the script that makes a shell complete this command",
    'eval "$(dbrx-quant completion bash)"',
    add_arguments,
    run,
)
