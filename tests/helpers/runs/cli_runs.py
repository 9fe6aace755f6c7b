"""Running the command in this process, or as one of its own."""

import subprocess
import sys

from dbrx_quant.scripts.cli.main import main


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def spawn(*arguments, module="cli.main", **options):
    """A process of the command, or of another module of scripts/."""
    return subprocess.Popen(
        [sys.executable, "-m", f"dbrx_quant.scripts.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
