"""`dbrx-quant repack`: make the file that lets a folder's linears be mapped as the CPU kernels read them."""

import argparse

from dbrx_quant.runtime.output.progress import counter
from dbrx_quant.scripts.terminal.arguments import add_quiet_argument, local_folder
from dbrx_quant.scripts.terminal.output import bytes_text, print_json
from dbrx_quant.scripts.terminal.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folder", metavar="DIR", help="a quantized folder, which gets a second copy of its linears"
    )
    add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make it, whether there is one or not."""
    from dbrx_quant.runtime.families import describe
    from dbrx_quant.runtime.families.config import load_config
    from dbrx_quant.runtime.folder.contents import read_contents
    from dbrx_quant.runtime.folder.repacked_file import write_repacked
    from dbrx_quant.runtime.library import _native

    folder = local_folder(arguments.folder, "repack")
    if (reason := _native.why_unavailable()) is not None:
        raise RuntimeError(f"repack: the file is for the native kernels, which cannot be used: {reason}")
    architecture = describe(load_config(folder))
    contents = read_contents(architecture, architecture.open(folder))
    with counter("repack", "B", arguments.quiet) as progress:
        made = write_repacked(contents, progress)
    size = made.path.stat().st_size
    if arguments.json:
        print_json({"file": made.path.name, "linears": len(made.places), "bytes": size})
    else:
        print(f"{arguments.folder}: wrote {made.path.name}: {len(made.places)} linears, {bytes_text(size)}")
    return 0


VERB = Verb(
    "repack",
    "store an EXL2 folder's linears as the CPU reads them, to start at once and to run beyond the memory",
    "dbrx-quant repack out/dbrx",
    add_arguments,
    run,
)
