"""How a model runs whose weights do not all fit into memory: first token, steady pace, bytes read, floor.

    python -m dbrx_quant.scripts.full_size.bench_memory DIR --memory SIZE [--limit SIZE] [--tokens N]
        [--prompt N] [--json] [--record DIR]

Generates on a quantized folder (`make_quantized` writes random ones) with the repacked file cold: the system
is asked to forget it first. Bytes are those that the kernel says it fetched for this process. The floor of a
token is these bytes at the rate of the disk, which is tried out at the end. Without `--limit` the system may
keep all of the file that the machine has memory for; with it the process puts itself into a control group
of that size (its own memory and the pages of files that it reads), which takes the right to make one.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.folder.expert_use import expert_use
from dbrx_quant.runtime.folder.repacked_file import RepackedFile, open_repacked, write_repacked
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.model.read_rates import disk_rate, drop_pages
from dbrx_quant.scripts.dev.bench_record import add_record_argument, record
from dbrx_quant.scripts.terminal.arguments import positive, size
from dbrx_quant.scripts.terminal.output import print_json, print_table, quiet_on_closed_pipe, say

_GROUPS = Path("/sys/fs/cgroup")


def read_bytes() -> int:
    """Bytes that the disk has delivered for this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


@contextmanager
def memory_limit(limit: int | None) -> Iterator[None]:
    """Hold this process to so many bytes inside the block, the pages of files among them.

    Raises:
        OSError: it may not make a control group.
    """
    if limit is None:
        yield
        return
    home, file = _control_group()
    inner = home / f"bench-memory-{os.getpid()}"
    inner.mkdir()
    try:
        (inner / file).write_text(str(limit))
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        inner.rmdir()


def _control_group() -> tuple[Path, str]:
    """The control group of this process that counts memory, and the file of a group's limit."""
    path = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _GROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    return _GROUPS / path.lstrip("/"), "memory.max"


class _Clock:
    """A streamer that notes when each token is there, and what has been read until then."""

    def __init__(self) -> None:
        self.at: list[tuple[float, int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then each token."""
        self.at.append((time.perf_counter(), read_bytes()))

    def end(self) -> None:
        """Nothing is left to do."""


def forget(file: RepackedFile) -> None:
    """Have the system drop the file's pages."""
    with file.path.open("rb") as stream:
        os.fsync(stream.fileno())
        for place in file.places:
            drop_pages(stream.fileno(), place)


def measure(folder: Path, memory: int, tokens: int, prompt: int) -> dict[str, Any]:
    """The figures of one run, JSON-ready."""
    architecture = describe(load_config(folder))
    contents = read_contents(architecture, architecture.open(folder))
    file = open_repacked(contents) or write_repacked(contents)
    forget(file)
    lines: list[str] = []
    start = time.perf_counter()
    model = load_model(folder, memory=memory, notify=lines.append)
    loaded = time.perf_counter() - start
    for line in lines:
        say(line)
    model.generation_config.eos_token_id = None
    ids = torch.arange(1, prompt + 1)[None]
    clock = _Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,  # the likeliest token of random weights soon repeats itself, and its experts
        streamer=clock,
    )
    (begin, _), (first, _), *later = clock.at
    steady = clock.at[1 + len(later) // 4 :]  # the first ones have checksums to compare
    seconds = [b[0] - a[0] for a, b in pairwise(steady)]
    fetched = [b[1] - a[1] for a, b in pairwise(steady)]
    rate = disk_rate(file, file.places)
    use, _ = expert_use(folder, architecture)
    chances = [1.0 if p.spec.expert is None else use[p.spec.block or 0][p.spec.expert] for p in file.places]
    return {
        "weights_bytes": sum(place.body_bytes for place in file.places),
        "token_bytes": sum(p.body_bytes * chance for p, chance in zip(file.places, chances, strict=True)),
        "own_bytes": own_memory(),
        "load_s": loaded,
        "first_token_s": first - begin,
        "tokens_per_s": len(seconds) / sum(seconds),
        "median_ms": 1e3 * statistics.median(seconds),
        "read_bytes": statistics.mean(fetched),
        "disk_bytes_per_s": rate,
        "floor_ms": 1e3 * statistics.mean(fetched) / rate,
        "said": lines,
    }


@quiet_on_closed_pipe
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="a quantized folder")
    parser.add_argument(
        "--memory", metavar="SIZE", type=size, required=True, help="weights that stay in memory"
    )
    parser.add_argument("--limit", metavar="SIZE", type=size, help="of all memory (default: the machine's)")
    parser.add_argument("--tokens", type=positive, default=32, help="to generate (default: %(default)s)")
    parser.add_argument("--prompt", type=positive, default=16, help="tokens of it (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    if arguments.tokens < 8:
        parser.error("--tokens: at least 8, or there is no steady pace")
    with memory_limit(arguments.limit):
        figures = measure(arguments.folder, arguments.memory, arguments.tokens, arguments.prompt)
    record("memory", arguments, figures)
    if arguments.json:
        print_json(figures)
        return 0
    print_table(
        f"{figures['weights_bytes'] / 1e9:.2f} GB of linears, {figures['own_bytes'] / 1e9:.2f} GB own memory",
        [
            "load s",
            "first token s",
            "tokens/s",
            "GB a token needs",
            "GB read from disk",
            "disk GB/s",
            "floor ms",
            "ms",
        ],
        [
            [
                f"{figures['load_s']:.1f}",
                f"{figures['first_token_s']:.1f}",
                f"{figures['tokens_per_s']:.2f}",
                f"{figures['token_bytes'] / 1e9:.2f}",
                f"{figures['read_bytes'] / 1e9:.2f}",
                f"{figures['disk_bytes_per_s'] / 1e9:.2f}",
                f"{figures['floor_ms']:.0f}",
                f"{figures['median_ms']:.0f}",
            ]
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
