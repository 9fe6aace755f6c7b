"""Where a model is: a folder on this machine, or a repository that is fetched from the Hub."""

import os
import re
from pathlib import Path

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.output.redact import redact_message

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.md"]
_REPOSITORY = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s@]+))?")
_WEIGHTS = (".safetensors", ".bin")


def find_folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a model: itself, or the one that a Hub repository was fetched to.

    Args:
        source: a folder, or `ORG/NAME` or `ORG/NAME@REVISION` on the Hub.
        revision: branch, tag or commit of a repository; None: as the source says, else `main`.

    Raises:
        CheckpointError: there is no such folder, and no such repository, or no way to it, or no model in it;
            where its branches hold some, they are listed.
        ValueError: a revision of a folder, or two different ones.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder; revision={revision!r} applies only to repositories")
        return folder
    found = _REPOSITORY.fullmatch(source) if isinstance(source, str) else None
    if not found:
        raise CheckpointError(f"{folder}: no such folder")
    if revision is not None and found["revision"] not in (None, revision):
        raise ValueError(f"{source}: names one revision, and {revision!r} is another; give one of them")
    return _fetch(found["id"], revision or found["revision"])


def _fetch(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.utils import httpx

    shown = f"{repository}@{revision}" if revision else repository
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_FETCHED))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{shown}: the repository has no such branch, tag or commit{_branches(repository)}"
        ) from error
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise CheckpointError(
            f"{shown}: no such folder, and not available on the Hub: {redact_message(str(error))}"
        ) from error
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise CheckpointError(
            f"{shown}: holds no weights{'' if revision else ' on its branch main'}{_branches(repository)}"
        )
    return folder


def _branches(repository: str) -> str:
    """The branches that a repository has beside main, and how to name one; empty where there are none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    try:
        listed = HfApi().list_repo_refs(repository).branches
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, httpx.InvalidURL):
        return ""
    names = sorted(branch.name for branch in listed if branch.name != "main")
    if not names:
        return ""
    return f"; it has the branches {', '.join(names)}: give {repository}@{names[0]}, or --revision {names[0]}"
