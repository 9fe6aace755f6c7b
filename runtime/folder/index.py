"""The index that tells transformers which shard holds a tensor: whether one is needed, and writing it.

transformers looks for `model.safetensors`, else for the index. exllamav2 calls its shards `output…` and
writes no index, or leaves a copy of the original's, which names shards that are not there.
"""

from pathlib import Path

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint, read_files
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME, read_index, shard_files
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.atomic import write_json
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.lock import locked
from dbrx_quant.runtime.folder.contents import read_contents


def unnamed_shard(folder: Path) -> str | None:
    """A shard that transformers finds only through an index; None where it finds all weights by itself.

    Raises:
        CheckpointError: there are several such files, or the index is none.
    """
    names = {file.name for file in shard_files(folder)}
    if not names or "model.safetensors" in names or names & set((read_index(folder) or {}).values()):
        return None
    if len(names) > 1:
        raise CheckpointError(
            f"{folder}: transformers needs an {INDEX_NAME} that names the {len(names)} shards; write it with "
            f"`dbrx-quant index {folder}`, or load it with dbrx_quant.runtime.load_model"
        )
    return names.pop()


def write_index(folder: Path) -> dict[str, str]:
    """Write the index of an EXL2 folder, replacing any other, and return it: stored name → file name.

    Raises:
        CheckpointError: the shards are not the complete EXL2 checkpoint that config.json describes.
        ValueError: another process works in the folder.
    """
    architecture = describe(load_config(folder))
    infos = read_files(shard_files(folder), architecture.normalise)
    read_contents(architecture, Checkpoint(folder, infos=infos))
    weight_map = {info.name: info.file.name for info in infos.values()}
    total = sum(info.nbytes for info in infos.values())
    with locked(folder):
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return weight_map
