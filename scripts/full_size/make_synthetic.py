"""Write a synthetic DBRX source: names, types and shards as on the Hub, weights as if trained.

    python -m dbrx_quant.scripts.full_size.make_synthetic OUT [--blocks N [--repeat M]] [--experts E] …

Without options it has the sizes of dbrx-instruct, 263 GB in 61 shards. It is drawn and written part by
part, and the same arguments give the same bytes on one kind of processor, with any number of threads. A
shard is whole or absent, and the same command goes on behind those that are there.

`--repeat M` writes the first M blocks only, under a configuration of N: block i is meant to be that of i
mod M, which `repeated_source` makes of it for the `dbrx-quant` command.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.checkpoint import read_header
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.files.atomic import remove_leftovers, write_json, write_parts
from dbrx_quant.runtime.tokenizer.ids import read_object
from dbrx_quant.runtime.tokenizer.tiktoken_source import SPECIAL, convert_tiktoken
from dbrx_quant.scripts.dev import make_tiny_dbrx as tiny
from dbrx_quant.scripts.full_size.weights import Planned, Sizes, Weights
from dbrx_quant.scripts.terminal.arguments import natural, positive, size
from dbrx_quant.scripts.terminal.output import bytes_text, quiet_on_closed_pipe, say, seconds_text

RECIPE_NAME = "RECIPE.json"
SHARD_BYTES = 5_000_000_000  # as transformers wrote them when DBRX came out
THREADS = 2  # that draw; each works by itself, so that sums do not depend on their number
TINY = Path(__file__).resolve().parents[2] / "tests" / "data" / "tiny-dbrx"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def config(sizes: Sizes, blocks: int) -> dict[str, Any]:
    """The `config.json`."""
    ffn = {"moe_num_experts": sizes.experts, "moe_top_k": sizes.active, "ffn_hidden_size": sizes.ffn}
    return {
        **tiny.CONFIG,
        "attn_config": {**tiny.CONFIG["attn_config"], "kv_n_heads": sizes.kv_heads},
        "d_model": sizes.hidden,
        "ffn_config": {**tiny.CONFIG["ffn_config"], **ffn},
        "max_seq_len": 32768,
        "n_heads": sizes.heads,
        "n_layers": blocks,
        "vocab_size": sizes.vocabulary,
    }


def shards(tensors: Sequence[Planned], most: int) -> list[list[Planned]]:
    """Tensors in runs of at most `most` bytes, larger ones by themselves."""
    runs: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not runs or stored_bytes(tensor) > room:
            runs.append([])
            room = most
        runs[-1].append(tensor)
        room -= stored_bytes(tensor)
    return runs


def stored_bytes(tensor: Planned) -> int:
    """Bytes of a tensor in bfloat16."""
    return 2 * math.prod(tensor.shape)


def header(tensors: Sequence[Planned]) -> bytes:
    """The head of a safetensors file that holds tensors one after another in bfloat16."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + stored_bytes(tensor)
        entries[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: Sequence[Planned]) -> None:
    """Write a shard, atomically, with a few parts of tensors in memory at a time."""
    head = header(tensors)
    with ThreadPoolExecutor(THREADS, initializer=_alone) as pool:

        def parts() -> Iterator[bytes | memoryview]:
            yield head
            drawn: deque[Future[Tensor]] = deque()
            for tensor in tensors:
                for part in range(tensor.parts):
                    drawn.append(pool.submit(_bfloat16, tensor, part))
                    if len(drawn) > THREADS:
                        yield _bytes(drawn.popleft())
            while drawn:
                yield _bytes(drawn.popleft())

        write_parts(path, parts(), len(head) + sum(map(stored_bytes, tensors)))


def _alone() -> None:
    torch.set_num_threads(1)


def _bfloat16(tensor: Planned, part: int) -> Tensor:
    return tensor.draw(part).bfloat16()


def _bytes(drawn: Future[Tensor]) -> memoryview:
    flat = drawn.result().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def is_written(path: Path, tensors: Sequence[Planned]) -> bool:
    """Whether a shard with these tensors is there."""
    if not path.exists():
        return False
    found = {name: info.shape for name, info in read_header(path).items()}
    return found == {tensor.name: tensor.shape for tensor in tensors}


def make(
    folder: Path,
    sizes: Sizes,
    blocks: int,
    *,
    repeat: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    quiet: bool = False,
) -> None:
    """Write the model, or what is missing of it.

    Args:
        folder: made if it is not there.
        sizes: of the model.
        blocks: of its configuration.
        repeat: how many of them are written; None: all.
        seed: of the weights.
        shard_bytes: of a shard at most.
        tokenizer: a folder whose tokenizer is taken; None: GPT-4's, which is DBRX's, where the vocabulary is
            large enough, else that of tests/data/tiny-dbrx.
        quiet: nothing on stderr.

    Raises:
        ValueError: the folder holds something else.
    """
    stored = min(repeat or blocks, blocks)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {**asdict(sizes), "seed": seed, "stored_blocks": stored, "shard_bytes": shard_bytes}
    recipe["torch"] = torch.__version__
    remove_leftovers(folder)
    if any(folder.iterdir()) and read_object(folder / RECIPE_NAME) != recipe:
        raise ValueError(
            f"{folder}: holds something else than what these arguments make; give another folder"
        )
    write_json(folder / RECIPE_NAME, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = shards(list(Weights(sizes, seed).tensors(stored)), shard_bytes)
        weight_map: dict[str, str] = {}
        for number, run in enumerate(runs, 1):
            path = folder / f"model-{number:05}-of-{len(runs):05}.safetensors"
            weight_map |= {tensor.name: path.name for tensor in run}
            started = time.perf_counter()
            if not is_written(path, run):
                write_shard(path, run)
                if not quiet:
                    took = seconds_text(time.perf_counter() - started)
                    say(f"{path.name}: {bytes_text(path.stat().st_size)} in {took}")
    finally:
        torch.set_num_threads(threads)
    total = sum(stored_bytes(tensor) for run in runs for tensor in run)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_tokenizer(folder, sizes.vocabulary, tokenizer)
    write_json(folder / "config.json", config(sizes, blocks))


def _write_tokenizer(folder: Path, vocabulary: int, given: Path | None) -> None:
    named = 3  # tokens that `convert_tiktoken` adds: <|pad|>, <|im_start|>, <|im_end|>
    if given is None and vocabulary > max(SPECIAL.values()) + named:
        settings = {**read_object(TINY / TOKENIZER_FILES[1]), "model_max_length": 32768}
        settings["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
        write_json(folder / TOKENIZER_FILES[1], settings)
        write_json(folder / TOKENIZER_FILES[0], convert_tiktoken(folder, {})[0])
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile((given or TINY) / name, folder / name)


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder")
    parser.add_argument("--blocks", type=positive, default=40, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=positive, metavar="M", help="write the first M blocks only")
    for field in fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=positive, default=field.default, help="(default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="(default: %(default)s)")
    parser.add_argument("--shard-size", type=size, default=SHARD_BYTES, help="at most (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a folder whose tokenizer is taken")
    given = parser.parse_args(argv)
    sizes = Sizes(**{field.name: getattr(given, field.name) for field in fields(Sizes)})
    started = time.perf_counter()
    make(
        given.out,
        sizes,
        given.blocks,
        repeat=given.repeat,
        seed=given.seed,
        shard_bytes=given.shard_size,
        tokenizer=given.tokenizer,
    )
    say(f"{given.out}: written in {seconds_text(time.perf_counter() - started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
