"""An EXL2 folder, opened for vLLM: checked before anything is built, and refused where vLLM cannot run it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME, read_index
from dbrx_quant.runtime.families import describe, family_of
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents, read_contents
from dbrx_quant.runtime.folder.finite import check_finite
from dbrx_quant.runtime.kernels.bodies import Body
from dbrx_quant.runtime.model.repacked_linears import mapped_bodies
from dbrx_quant.runtime.vllm.places import Places, stored_names

_MISTRAL = "consolidated"  # where files are called so, vLLM reads no others


@dataclass(frozen=True)
class Opened:
    """A folder that was found sound.

    Attributes:
        contents: its tensors.
        places: its linears by vLLM's layers.
        names: stored name → vLLM's, as `places.stored_names` gives them.
        bodies: linear → its body in the folder's `repacked.bin`; empty where there is none.
    """

    contents: Contents
    places: Places
    names: dict[str, str | None]
    bodies: dict[str, Body]


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Torch's own default device and dtype: vLLM sets others while it builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def open_folder(folder: Path) -> Opened:
    """Open and check a folder, once in a process.

    Raises:
        CheckpointError: it is no sound EXL2 checkpoint of a family that is known here, or vLLM would compute
            something else, or would read only part of it.
    """
    with plain_defaults():
        config = load_config(folder)
        architecture = describe(config)
        family = family_of(config.model_type)
        if problem := family.vllm_problem(config):
            raise CheckpointError(f"{folder / 'config.json'}: {problem}; use `dbrx-quant serve`")
        contents = read_contents(architecture, architecture.open(folder))
        check_finite(contents)
        check_all_read(folder, {file.name for file in contents.checkpoint.files()})
        return Opened(
            contents,
            Places(architecture),
            stored_names(contents, family.vllm_by_module),
            mapped_bodies(contents),
        )


def check_all_read(folder: Path, shards: set[str]) -> None:
    """Refuse a folder of whose shards vLLM would read only some: it would run with memory as it found it.

    Args:
        folder: the model's.
        shards: names of the files that hold its tensors.

    Raises:
        CheckpointError: names what is left out.
    """
    odd = {name for name in shards if name.startswith(_MISTRAL)}
    if odd and odd != shards:
        raise CheckpointError(
            f"{folder}: vLLM would read only {', '.join(sorted(odd))} of its shards; rename them"
        )
    index = read_index(folder)
    left = sorted(shards - set(index.values())) if index is not None else []
    if left:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: does not name {left[0]}, which vLLM would leave out; "
            f"write it anew with `dbrx-quant index {folder}`"
        )
