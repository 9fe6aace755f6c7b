"""The `dbrx-quant` command on a source that stores its first M blocks only: block i is that of i mod M.

    python -m dbrx_quant.scripts.full_size.repeated_source convert FOLDER OUT --bpw 3.0 …

So a conversion of DBRX's size runs with the disk of a few blocks. `config.json` says how many the model
has. All that differs from the command is the table from names to places in the shards: it names a stored
tensor once for each block that has it, or leaves blocks out that the configuration does not have. The
shards and their headers are read, checked, watched and fingerprinted as ever.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint, TensorInfo
from dbrx_quant.runtime.families import source
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

_BLOCK = re.compile(r"(model\.layers\.)(\d+)(\..+)")


def repeated(infos: Mapping[str, TensorInfo], blocks: int) -> dict[str, TensorInfo]:
    """The tensors of a model with so many blocks, from those of its first ones, by normalised names.

    Raises:
        CheckpointError: no block, or blocks with a gap between them.
    """
    found = {name: match for name in infos if (match := _BLOCK.fullmatch(name))}
    stored = sorted({int(match[2]) for match in found.values()})
    if not stored or stored != list(range(len(stored))):
        raise CheckpointError(f"the stored blocks are {stored}; expected 0, 1, … without a gap")
    result = {name: info for name, info in infos.items() if name not in found}
    for name, match in found.items():
        for index in range(int(match[2]), blocks, len(stored)):
            result[f"{match[1]}{index}{match[3]}"] = infos[name]
    return result


def open_repeated(folder: Path) -> Checkpoint:
    """The weights of a source of which the first blocks are stored, under normalised names."""
    stored = _open_weights(folder)
    infos = {name: stored.info(name) for name in stored.names()}
    return Checkpoint(folder, infos=repeated(infos, load_config(folder).num_hidden_layers))


_open_weights = source.open_weights


@contextmanager
def repeated_sources() -> Iterator[None]:
    """Inside the `with` block every source is opened by `open_repeated`."""
    source.open_weights = open_repeated
    try:
        yield
    finally:
        source.open_weights = _open_weights


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line of `dbrx-quant`."""
    from dbrx_quant.scripts.cli.main import main as command

    with repeated_sources():
        return command(argv)


if __name__ == "__main__":
    sys.exit(main())
