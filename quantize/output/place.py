"""The folders that results go to: fit for them, and nobody else's, before any work is done."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.lock import locked
from dbrx_quant.runtime.folder.verify import PRODUCER
from dbrx_quant.runtime.shards.write import check_foreign


@contextmanager
def claimed(folders: Sequence[Path], model: Path) -> Iterator[None]:
    """Make the folders of results and lock them while the `with` block runs.

    Args:
        folders: of the results; those that stay empty are removed again.
        model: the original's folder.

    Raises:
        ValueError: one is the original's, or another process works in it.
        CheckpointError: one holds somebody else's model or files that would be in the way.
        OSError: one cannot be made or written.
    """
    for out in folders:
        if os.path.realpath(out) == os.path.realpath(model):
            raise ValueError(f"{out}: the output folder must differ from the model's")
    with ExitStack() as held:
        for out in dict.fromkeys(folders):
            held.enter_context(locked(out))
            _check_contents(out, model)
        yield


def _check_contents(out: Path, model: Path) -> None:
    for path in out.iterdir():
        written = path.suffix in (".json", ".jinja", ".safetensors") or (model / path.name).is_file()
        if written and path.is_dir():
            raise CheckpointError(f"{path}: a folder, where a file of the result belongs; move it away")
    if check_foreign(out) and (producer := _producer(out)) is not None and not producer.startswith(PRODUCER):
        raise CheckpointError(
            f"{out}: holds a model that this converter has not written, which would be lost; "
            "give another folder, or empty this one"
        )


def _producer(out: Path) -> str | None:
    """What wrote a model, by its config; None: it has none that can be read, as half of a result."""
    try:
        section = read_config(out).get("quantization_config")
    except CheckpointError:
        return None
    return str(section.get("version", "")) if isinstance(section, dict) else ""
