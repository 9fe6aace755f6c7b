"""What a finished result consists of, `done.json` of the work folder, and whether it is still there.

Copies of the small files are kept beside it, so that these can be written anew without quantizing again.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from dbrx_quant.quantize.budget.strategy import STRATEGY_NAME
from dbrx_quant.quantize.measurement import MEASUREMENT_NAME
from dbrx_quant.quantize.output.record import RECORD_NAME
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.files.atomic import write_parts
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.sealed import remove, sha256
from dbrx_quant.runtime.folder.checksums import CHECKSUMS_NAME, read_checksums
from dbrx_quant.runtime.tokenizer.fix import TOKENIZER_FILES

_FILE = JsonFile("a list of finished files", version=1, remedy="start over with --resume never", sealed=True)
_NAME = "done.json"
_COPIES = ".finished"  # hidden: what is in it is checked when it is needed
_EDITED = "README.md"  # people write their model card into it
_WRITTEN = (
    *("config.json", "generation_config.json", *TOKENIZER_FILES),
    *(MEASUREMENT_NAME, STRATEGY_NAME, RECORD_NAME, CHECKSUMS_NAME, INDEX_NAME),
)


def note_finished(work: Path, out: Path, side_files: Iterable[str]) -> None:
    """Write down what a result consists of that has just been verified.

    Args:
        work: the part of the work folder that belongs to it.
        out: where it is.
        side_files: names of the files that were copied along.
    """
    copies, files = work / _COPIES, {}
    copies.mkdir(exist_ok=True)
    for name in (*_WRITTEN, *side_files):
        if (out / name).is_file():
            shutil.copyfile(out / name, copies / name)
            files[name] = sha256(copies / name)
    shards = {name: checksum.sha256 for name, checksum in read_checksums(out).items()}
    _FILE.write(work / _NAME, {"files": files, "shards": shards})


def was_finished(work: Path) -> bool:
    """Whether a result has been finished, be it there or not."""
    return (work / _NAME).exists()


def is_finished(work: Path, out: Path) -> bool:
    """Whether a result is there as it was finished; small files that are not are written anew.

    What is not as it was is named on stderr.
    """
    try:
        done = _FILE.read(work / _NAME)
    except FileNotFoundError:
        return False
    shards, files = done.object("shards"), done.object("files")
    found = {path.name for path in out.glob("*.safetensors")}
    damaged = [name for name in shards.values if not _is(out / name, shards.text(name))]
    damaged += sorted(found - shards.values.keys())
    for name in () if damaged else files.values:
        expected, path, copy = files.text(name), out / name, work / _COPIES / name
        if _is(path, expected) or (name == _EDITED and path.is_file()):
            continue
        if _is(copy, expected):
            _tell(path, "written anew")
            write_parts(path, (copy.read_bytes(),))
        else:
            damaged.append(name)
    for name in damaged:
        _tell(out / name, "this target is quantized again")
    if damaged:
        remove(work / _NAME)
    return not damaged


def _is(path: Path, expected: str) -> bool:
    return path.is_file() and sha256(path) == expected


def _tell(path: Path, then: str) -> None:
    print(f"notice: {path}: not as it was written; {then}", file=sys.stderr)
