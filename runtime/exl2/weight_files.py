"""Which files of a model folder hold its weights: those of the index, or of the usual names."""

import re
from pathlib import Path

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import load_json

INDEX_NAME = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_OTHERS = re.compile(r"(consolidated|adapter_model).*")  # Mistral's own format, and adapters
_NUMBERED = re.compile(r".*-\d{5}-of-(\d{5})\.\w+")


def shard_files(folder: Path) -> list[Path]:
    """All `*.safetensors` files of a folder, without hidden ones (macOS leaves `._model.safetensors`)."""
    return [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")]


def weight_files(folder: Path, source: bool = False) -> list[Path]:
    """The files that hold a model.

    Hidden files, files of Mistral's own format and adapters do not count. Of an original, an index chooses,
    if any of its shards is there; of a quantized folder all shards count: exllamav2 leaves stale indexes.

    Args:
        folder: of the model.
        source: it is an original, to be read as transformers does: without an index, `model.safetensors`
            stands for itself, and where there is nothing else, `pytorch_model*.bin` are taken.

    Raises:
        CheckpointError: there are none, a shard of the index is missing, or the index is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    files = [file for file in shard_files(folder) if not _OTHERS.fullmatch(file.name)]
    if source:
        indexed = _indexed(folder, INDEX_NAME, shard_files(folder))
        files = indexed or _alone(files, "model.safetensors") or files or _pickled(folder)
    if not files:
        pickled = " or pytorch_model*.bin" if source else ""
        raise CheckpointError(f"{folder}: no *.safetensors{pickled} files in it")
    return files


def read_index(folder: Path, name: str = INDEX_NAME) -> dict[str, str] | None:
    """Stored name → file name by a folder's index; None where it has none.

    Raises:
        CheckpointError: it is no index, or names a file that is not one of the folder's own.
    """
    path = folder / name
    try:
        weight_map = load_json(path)["weight_map"]
        found = {str(tensor): str(file) for tensor, file in dict(weight_map).items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r}); delete or rewrite it") from None
    for file in found.values():
        if Path(file).name != file or file in ("", ".."):
            raise CheckpointError(
                f"{path}: places a tensor in {file!r}, expected the name of a file beside it"
            )
    return found


def _indexed(folder: Path, index: str, files: list[Path]) -> list[Path]:
    """The files that an index names; none where it names none that is there."""
    named = set((read_index(folder, index) or {}).values())
    if not named & {file.name for file in files}:
        return []
    for name in sorted(named):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / index}: names the shard {name}, which isn't there; fetch it again"
            )
    return [folder / name for name in sorted(named)]


def _pickled(folder: Path) -> list[Path]:
    files = sorted(folder.glob("pytorch_model*.bin"))
    numbered = [file for file in files if _NUMBERED.fullmatch(file.name)]
    return _indexed(folder, _PICKLED_INDEX, files) or _alone(files, "pytorch_model.bin") or numbered


def _alone(files: list[Path], name: str) -> list[Path]:
    return [file for file in files if file.name == name]
