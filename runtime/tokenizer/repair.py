"""Repairs the tokenizer files and token ids of a model folder in place, quantized or not.

What is right is left alone, byte for byte; of what is replaced, the file as it was is kept in a subfolder. So
a second repair finds nothing to do, and an interrupted one is finished by the next.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.source import embedding_rows
from dbrx_quant.runtime.files.atomic import write_json, write_parts
from dbrx_quant.runtime.files.lock import locked
from dbrx_quant.runtime.tokenizer.check import Problem, check_tokenizer
from dbrx_quant.runtime.tokenizer.fix import TOKENIZER_FILES, write_tokenizer
from dbrx_quant.runtime.tokenizer.ids import read_object, set_ids, special_ids

KEPT_FOLDER = "tokenizer-before-repair"
CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Repair:
    """What a repair changes.

    Attributes:
        problems: what was wrong before.
        changes: what it does about it, a sentence each.
        files: name → new content of the files that it writes.
        remaining: what stays wrong.
    """

    problems: tuple[Problem, ...]
    changes: tuple[str, ...]
    files: dict[str, bytes]
    remaining: tuple[Problem, ...]


def check_folder(folder: Path) -> list[Problem]:
    """Everything wrong with the tokenizer of a model folder; its config gives the limit of ids.

    Raises:
        CheckpointError: there is no `config.json`, or transformers does not know its model.
    """
    return check_tokenizer(folder, _vocabulary_size(folder))


def plan_repair(folder: Path) -> Repair:
    """What a repair of the folder would do; nothing is written there.

    Raises:
        CheckpointError: as in `check_folder`; or it can't be fixed: no usable tokenizer, a damaged file, two
            files that give a token different ids, an id outside the embedding.
    """
    size = _vocabulary_size(folder)
    problems = check_tokenizer(folder, size)
    with tempfile.TemporaryDirectory() as temporary:
        trial = Path(temporary)
        changes = write_tokenizer(folder, trial, size)
        ids = special_ids(trial, folder, size)
        for name in CONFIGS:
            content = read_object(folder / name)
            set_ids(content, ids)
            write_json(trial / name, content)
            changes += _changed_ids(folder, name, content)
        files = {}
        for name in (*TOKENIZER_FILES, *CONFIGS):
            if (trial / name).is_file() and not _same(folder / name, trial / name):
                files[name] = (trial / name).read_bytes()
                if not (folder / name).exists():
                    changes.append(f"{name}: missing, created")
        remaining = check_tokenizer(trial, size)
    return Repair(tuple(problems), tuple(changes) if files else (), files, tuple(remaining))


def apply_repair(folder: Path, repair: Repair) -> Path | None:
    """Write the files of a repair; returns the subfolder with the replaced ones, or None.

    Raises:
        ValueError: another process works in the folder.
        OSError: the folder cannot be written; what was replaced until then is in the subfolder.
    """
    if not repair.files:
        return None
    with locked(folder):
        replaced = [name for name in repair.files if (folder / name).exists()]
        kept = _free_name(folder) if replaced else None
        if kept is not None:
            kept.mkdir()
            for name in replaced:
                write_parts(kept / name, ((folder / name).read_bytes(),))
        for name, content in repair.files.items():
            write_parts(folder / name, (content,))
    return kept


def _vocabulary_size(folder: Path) -> int:
    rows = embedding_rows(folder)
    return int(load_config(folder).vocab_size) if rows is None else rows


def _changed_ids(folder: Path, name: str, content: dict[str, object]) -> list[str]:
    before = read_object(folder / name)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return [
        f"{name}: {key} {before.get(key, 'missing')} → {content[key]}"
        for key in keys
        if (folder / name).is_file() and content.get(key) != before.get(key)
    ]


def _same(old: Path, new: Path) -> bool:
    """Whether two files say the same: equal bytes, or equal JSON however it is formatted."""
    if not old.is_file():
        return False
    if old.suffix != ".json":
        return old.read_bytes() == new.read_bytes()
    return bool(read_object(old) == json.loads(new.read_text(encoding="utf-8")))


def _free_name(folder: Path) -> Path:
    path, number = folder / KEPT_FOLDER, 1
    while path.exists():
        number += 1
        path = folder / f"{KEPT_FOLDER}-{number}"
    return path
