"""Links that lead out of a model folder: what they point to is no part of the model."""

from collections.abc import Iterable
from pathlib import Path

from dbrx_quant.runtime.files.errors import CheckpointError


def leaves(path: Path) -> bool:
    """Whether a file of a model folder is a link to somewhere else.

    A snapshot in the Hub's cache (`models--ORG--NAME/snapshots/REVISION`) consists of links to the blobs of
    the same repository, which are part of it.
    """
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        homes.append(folder.parent.parent / "blobs")
    return path.is_symlink() and not any(target.is_relative_to(home) for home in homes)


def refuse_links_out(paths: Iterable[Path]) -> None:
    """Raise CheckpointError naming the first of some files that is a link out of its folder."""
    for path in paths:
        if leaves(path):
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, outside of the folder, and is not followed; put a "
                "copy of the file in its place if it belongs to the model, else remove the link"
            )
