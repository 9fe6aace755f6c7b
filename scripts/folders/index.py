"""`dbrx-quant index`: write the index that transformers needs to find the tensors of several shards."""

import argparse

from dbrx_quant.scripts.terminal.arguments import local_folder
from dbrx_quant.scripts.terminal.output import print_json
from dbrx_quant.scripts.terminal.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", help="a quantized folder, for example from exllamav2")


def run(arguments: argparse.Namespace) -> int:
    """Write it."""
    from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
    from dbrx_quant.runtime.folder.index import write_index

    weight_map = write_index(local_folder(arguments.folder, "index"))
    shards = len(set(weight_map.values()))
    if arguments.json:
        print_json({"file": INDEX_NAME, "tensors": len(weight_map), "shards": shards})
    else:
        print(f"{arguments.folder}: wrote {INDEX_NAME}: {len(weight_map)} tensors in {shards} shards")
    return 0


VERB = Verb(
    "index",
    "write the index of an EXL2 folder's shards, which exllamav2 omits and transformers needs",
    "dbrx-quant index out/dbrx",
    add_arguments,
    run,
)
