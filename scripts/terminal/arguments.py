"""The arguments and values that several verbs share, among them those of a conversion's options.

Everything here is imported for `--help`, so it imports nothing heavy.
"""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.quantize.declared import Declared, flag
from dbrx_quant.quantize.options import ConvertOptions, declarations, defaults
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.scripts.terminal.verb import UsageError

if TYPE_CHECKING:
    from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory

LOWEST_BPW, HIGHEST_BPW = 2.0, 8.5  # what the format's widths allow; a model's own range is narrower

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MOST_BYTES = 2.0**62
_LARGEST = 2**62  # what torch takes for a number
_LEAST_BARE_SIZE = 1_000_000  # a smaller number without a unit is a forgotten unit


def size(text: str) -> int:
    """Bytes from `40GB` (10^9 each) or `22GiB` (2^30 each); a number without a unit is bytes.

    Raises:
        ArgumentTypeError: it is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 40GB, 22.5GB or 22GiB")
    number, prefix, binary, _ = match.groups()
    if binary and not prefix:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 40GB, 22.5GB or 22GiB")
    exact = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()]
    if exact > _MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any machine has; write it like 40GB")
    value = int(exact)
    if not prefix and value < _LEAST_BARE_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is {value} bytes; for gigabytes write {number}GB")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the size is zero; write it like 40GB or 22GiB")
    return value


def bpw_list(text: str) -> tuple[float, ...]:
    """Targets in bits per weight from `3.0` or `2.25,3.0,4.25`.

    Raises:
        ArgumentTypeError: one is not a number, outside what the format allows, or given twice.
    """
    targets: list[float] = []
    for part in text.split(","):
        try:
            target = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a number; write 3.0 or 2.25,3.0,4.25"
            ) from None
        if not LOWEST_BPW <= target <= HIGHEST_BPW:
            raise argparse.ArgumentTypeError(
                f"{part.strip()} bits per weight; the format allows {LOWEST_BPW:g} to {HIGHEST_BPW:g}"
            )
        if target in targets:
            raise argparse.ArgumentTypeError(f"{target} is given twice")
        targets.append(target)
    return tuple(targets)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def temperature(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    if value > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at most {_LARGEST}")
    return value


def add_model_argument(
    parser: argparse.ArgumentParser,
    help: str = "a quantized folder, or its id on the Hub",
    name: str = "folder",
    metavar: str = "DIR",
    **more: Any,
) -> None:
    """A model, on this machine or on the Hub, and `--revision`; `find_model` finds it."""
    parser.add_argument(name, metavar=metavar, help=f"{help}; ORG/NAME@BRANCH names a branch", **more)
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch, tag or commit of a model on the Hub (default: main)"
    )


def find_model(given: str, arguments: argparse.Namespace) -> Path:
    """The folder of a model that a command line gives, fetched if it is on the Hub.

    Raises:
        UsageError: a revision of a folder, or two revisions.
        CheckpointError: there is no such model.
    """
    from dbrx_quant.runtime.folder.find import find_folder

    try:
        return find_folder(given, arguments.revision)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None


def local_folder(given: str, verb: str) -> Path:
    """The folder on this machine that a command line gives to a verb which writes into it.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(given)
    if not folder.is_dir():
        fetch = "a model of the Hub has to be fetched first, with `hf download ORG/NAME --local-dir DIR`"
        raise CheckpointError(f"{folder}: no such folder; {verb} writes into it: {fetch}")
    return folder


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """`--device`, of the verbs that run a model."""
    parser.add_argument(
        "--device",
        default="cpu",
        help="where to run: cpu, cuda, several GPUs as cuda:0,cuda:1, or auto: as many GPUs as it takes "
        "(default: %(default)s)",
    )


def add_memory_argument(parser: argparse._ActionsContainer) -> None:
    """`--memory`, of the verbs that run a model."""
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=size,
        help="weights that stay in memory, such as 20GB: what every token needs, then the busiest experts; "
        "the others come from disk (CPU only; default: all stay)",
    )


def add_gpu_memory_argument(parser: argparse._ActionsContainer) -> None:
    """`--gpu-memory`, of the verbs that run a model; `gpu_memory` reads it."""
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        type=size,
        help="split a mixture of experts: so much of a GPU's memory, such as 22GB, holds what every token "
        "needs, the cache and the busiest experts; the CPU computes the others (default: one device)",
    )


def gpu_memory(
    arguments: argparse.Namespace, context: int | None = None, logits: int = 1
) -> "GpuMemory | None":
    """What `--gpu-memory` asks for, as `load_model` takes it.

    Args:
        arguments: from a parser with `add_gpu_memory_argument`.
        context: tokens that the cache has to hold, where that is known.
        logits: tokens of which logits are made at once.
    """
    from dbrx_quant.runtime.hybrid.gpu_plan import GpuMemory

    return None if arguments.gpu_memory is None else GpuMemory(arguments.gpu_memory, context, logits)


def add_quiet_argument(parser: argparse._ActionsContainer) -> None:
    """`--quiet`, of the verbs that can take minutes."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_options(parser: argparse.ArgumentParser, *, measuring: bool = False) -> None:
    """Declare the options of a conversion, or those that measuring alone has too."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    values = defaults()
    for name, declared in declarations():
        if measuring and not declared.measuring:
            continue
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        groups[declared.group].add_argument(
            flag(name, declared), dest=name, default=values[name], help=declared.help, **_value(declared)
        )


def options_of(arguments: argparse.Namespace, model: Path, out: Path, **more: Any) -> ConvertOptions:
    """The options that a command line gives.

    Args:
        arguments: from a parser with `add_options`.
        model: the original's folder.
        out: where the result goes.
        **more: further fields.
    """
    given = {name: getattr(arguments, name) for name, _ in declarations() if hasattr(arguments, name)}
    return ConvertOptions(model=model, out=out, **given, **more)


def _value(declared: Declared) -> dict[str, Any]:
    """How argparse takes an option's value."""
    if declared.kind == "switch":
        return {"action": "store_true"}
    if declared.kind == "choice":
        return {"type": type(declared.choices[0]), "choices": declared.choices}
    kinds: dict[str, Callable[[str], Any]] = {
        "device": str,
        "whole": positive if declared.least else natural,
        "size": size,
        "text": str,
        "file": Path,
        "folder": Path,
    }
    return {"type": kinds[declared.kind], "metavar": declared.metavar}
