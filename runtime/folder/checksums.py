"""`checksums.json` of a quantized folder: size and SHA-256 of every shard, written when all of them are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.runtime.files.json_file import JsonFile

CHECKSUMS_NAME = "checksums.json"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")  # a file right in its folder
_FILE = JsonFile("a list of checksums", version=1, remedy="fetch it again, or convert again")


@dataclass(frozen=True)
class Checksum:
    """The expected size and hash of a file."""

    sha256: str
    size: int


def write_checksums(folder: Path, files: Mapping[str, Checksum], rounded_to_zero: Mapping[str, int]) -> None:
    """Write the file, atomically.

    Args:
        folder: of the shards.
        files: name → what it should be.
        rounded_to_zero: 16-bit tensor → how many of its values are too small for half precision.
    """
    content = {"files": {name: vars(one) for name, one in files.items()}, "rounded_to_zero": rounded_to_zero}
    _FILE.write(folder / CHECKSUMS_NAME, content)


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """File name → expected checksum.

    Raises:
        FileNotFoundError: the folder has no checksums.
        CheckpointError: they are damaged, of another version, or of something else than shards of the folder.
    """
    fields = _FILE.read(folder / CHECKSUMS_NAME)
    checksums = {}
    for name, one in fields.objects("files"):
        if not _SHARD.fullmatch(name):
            raise fields.fault("files", f"a list with {name!r}, which is no shard of this folder")
        checksums[name] = Checksum(one.text("sha256"), one.integer("size"))
    return checksums
