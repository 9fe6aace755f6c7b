"""The counts in a raw config.json, held against what the shards hold before anybody loops over them."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.exl2.checkpoint import read_header
from dbrx_quant.runtime.exl2.weight_files import read_index, shard_files
from dbrx_quant.runtime.files.errors import CheckpointError

_COUNTS = re.compile(r"(?:moe_)?(?:num|n)_(?:\w+_)?(layer|experts|labels)s?")
_ALWAYS = 100_000  # matrices that are counted up without a second thought; no known model has as many
_HEADER_LIMIT, _ENTRY_BYTES = 100_000_000, 64  # of a shard's header, and of a tensor in it, at least


def check_counts(config: dict[str, Any], folder: Path) -> None:
    """Refuse numbers of layers, experts and labels that cannot be those of the folder's tensors.

    Raises:
        CheckpointError: names the numbers, and how many matrices the shards may hold.
    """
    counts = {"layer": 1, "experts": 0, "labels": 0}
    said = []
    for key, number in _numbers(config):
        if kind := _COUNTS.fullmatch(key):
            counts[kind[1]] = max(counts[kind[1]], number)
            said.append(f"{key} {number}")
    # attention and a feed-forward part take 7 matrices of a block, each expert 3
    matrices = max(counts["layer"] * (7 + 3 * counts["experts"]), counts["labels"])
    if matrices > _ALWAYS and matrices > (limit := _most_matrices(folder)):
        raise CheckpointError(
            f"{folder / 'config.json'}: {', '.join(said)} cannot be: the shards hold at most {limit} "
            "matrices; the file is damaged, or another model's"
        )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration and of the objects in it, with its key."""
    for key, value in config.items():
        if type(value) is int:
            yield key, value
        elif isinstance(value, dict):
            yield from _numbers(value)


def _most_matrices(folder: Path) -> int:
    """How many matrices the shards may hold: every one is a tensor, or at least a row of one with others."""
    tensors = rows = 0
    quantized = False
    for file in shard_files(folder):
        try:
            infos = read_header(file)
        except (CheckpointError, OSError):
            tensors += min(file.lstat().st_size, _HEADER_LIMIT) // _ENTRY_BYTES  # nobody can tell
            continue
        tensors += len(infos)
        rows += sum(math.prod(info.shape[:1]) for info in infos.values())
        quantized = quantized or any(name.endswith(".q_weight") for name in infos)
    with suppress(CheckpointError):
        tensors = max(tensors, len(read_index(folder) or {}))
    return tensors if quantized else max(tensors, rows)
