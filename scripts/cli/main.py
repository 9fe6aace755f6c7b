"""The `dbrx-quant` command: finds the verb, runs it, turns what goes wrong into one line and an exit code.

    0   done
    1   an error, reported in one line
    2   not used as documented
    3   a check failed
    70  an error that nobody thought of: a fault of this program, to be reported
    75  SIGTERM; the work done so far is kept
    130 Ctrl-C; likewise

Nothing here imports torch: `--help` answers at once.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dbrx_quant.quantize.workers.ranks import is_helper, speaker
from dbrx_quant.scripts.cli import (
    chat,
    completion,
    convert,
    doctor,
    generate,
    measure,
    report,
    serve,
    upload,
    verify,
)
from dbrx_quant.scripts.cli import eval as evaluate
from dbrx_quant.scripts.cli import inspect as inspection
from dbrx_quant.scripts.folders import index, repack, tokenizer
from dbrx_quant.scripts.terminal.arguments import add_output_arguments
from dbrx_quant.scripts.terminal.door import fault_line, guarded_streams
from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe, say
from dbrx_quant.scripts.terminal.verb import UsageError, Verb

VERBS: tuple[Verb, ...] = (
    convert.VERB,
    measure.VERB,
    inspection.VERB,
    verify.VERB,
    index.VERB,
    repack.VERB,
    tokenizer.VERB,
    evaluate.VERB,
    report.VERB,
    generate.VERB,
    chat.VERB,
    serve.VERB,
    upload.VERB,
    doctor.VERB,
    completion.VERB,
)

OK, FAILED, USAGE, CHECK_FAILED, FAULT, TERMINATED, CTRL_C = 0, 1, 2, 3, 70, 75, 130

EXPECTED = (ValueError, OSError, RuntimeError, MemoryError, ImportError)
UNFORESEEN = (UnicodeError, RecursionError, NotImplementedError)  # of those, what should have been made clear


class _Terminated(BaseException):
    """SIGTERM was received."""


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (bad usage raises SystemExit(2), as argparse does)."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments: argparse.Namespace | None = None
    with guarded_streams():
        try:
            try:
                arguments = make_parser().parse_args(given)
                _set_up_libraries()
                with _terminable():
                    return int(arguments.verb.run(arguments))
            finally:
                sys.stdout.flush()  # so that a full disk is reported like any error
        except (SystemExit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, _Terminated) as stop:
            if not is_helper():
                say(f"dbrx-quant: {_interrupted(arguments)}")
            return TERMINATED if isinstance(stop, _Terminated) else CTRL_C
        except UsageError as error:
            say(f"dbrx-quant {given[0]}: error: {_one_line(error)}")
            return USAGE
        except BaseException as error:  # what Rust libraries call a panic is no Exception
            expected = isinstance(error, EXPECTED) and not isinstance(error, UNFORESEEN)
            if "--debug" in given:
                traceback.print_exception(error)
            elif expected:
                say(f"dbrx-quant: error: {speaker()}{_one_line(error)}")
            else:
                say(f"dbrx-quant: internal error: {speaker()}{fault_line(error, given)}")
            return FAILED if expected else FAULT


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="dbrx-quant",
        description="EXL2 quantization of mixture-of-experts language models, DBRX first.",
        epilog="'dbrx-quant VERB --help' says more, with an example.",
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
        add_output_arguments(sub)
        sub.set_defaults(verb=verb, parser=parser)
    return parser


def _set_up_libraries() -> None:
    """Settings that torch and its libraries read once, unless the user has made them (docs/python.md).

    * libgomp lets waiting threads look for work 300,000 times before they sleep: where other programs hold
      the cores, a conversion would take several times its processor time. Here they sleep after 20 µs.
    * MKL, which multiplies matrices on Intel's processors, takes cache sizes as it finds them, and threads
      add up in the order in which they finish, unless it is asked for one order.
    * torch's large tensors, which a conversion gets from the system and gives back all the time, are mapped
      in pages of 2 MB: in pages of 4 KB that took up to half of the time.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"dbrx-quant {version('dbrx-quant')}")
        parser.exit()


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that files and bars are closed; a second one kills.

    What either raises may come out as another error of the library that it met, as safetensors makes one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops: list[BaseException] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stops.append(_Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise stops[-1]

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except BaseException as error:
        if stops and error is not stops[-1]:
            raise stops[-1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(arguments: argparse.Namespace | None) -> str:
    if arguments is None or not arguments.verb.resumable or getattr(arguments, "dry_run", False):
        return "interrupted"
    if getattr(arguments, "resume", "auto") == "never":
        return "interrupted; run it again with --resume auto to continue"
    return "interrupted; run the same command again to continue"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    if isinstance(error, MemoryError):
        text = f"out of memory; {text}".removesuffix("; ")
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
