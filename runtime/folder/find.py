"""Where a model is: a folder on this machine, or a repository that is fetched from the Hub."""

import os
import re
from pathlib import Path

from dbrx_quant.runtime.files.errors import CheckpointError

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.md"]
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a model: itself, or the one that a Hub repository was fetched to.

    Raises:
        CheckpointError: there is no such folder, and no such repository or no way to it.
        ValueError: a revision of a folder.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder; revision={revision!r} applies only to repositories")
        return folder
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        raise CheckpointError(f"{folder}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FETCHED))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: no such folder, and not available on the Hub: {error}") from error
