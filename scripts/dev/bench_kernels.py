"""How fast the CPU kernels run at DBRX's shapes, beside what this machine's memory gives. Random weights.

    python -m dbrx_quant.scripts.dev.bench_kernels [--threads N] [--json] [--record DIR] [--plot FILE]
        [--llama FOLDER]

One run measures, with 1 and 2 threads by default:

* decoding one token: matrices that rotate over more than 200 MB, so that weights come from memory, at every
  width; beside each figure the machine's own read bandwidth over the same bytes, measured in between;
* the same matrices for 1 to 512 tokens, beside torch's bfloat16 matmul on dense weights;
* one block of 16 experts, 4 of them active, at 3 bits a weight;
* with --llama, llama.cpp's matmuls on the same shapes (`bench_llama.py` says what FOLDER is).

Each figure is the best of many short runs: on a shared machine the best is what the kernel can do.
"""

import argparse
import ctypes
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels.activations import BITS
from dbrx_quant.runtime.kernels.repacked import Block, repack
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.kernels.structs import describe_linear
from dbrx_quant.runtime.library import _abi, _native
from dbrx_quant.scripts.dev.bench_record import add_record_argument, record
from dbrx_quant.scripts.terminal.output import print_json, print_table, quiet_on_closed_pipe

HIDDEN, FFN, EXPERTS, ACTIVE = 6144, 10752, 16, 4  # DBRX
SHAPES = ((HIDDEN, FFN), (FFN, HIDDEN))  # K, N
WIDTHS = (2, 3, 4, 5, 6, 8)
BATCHES = (1, 2, 4, 8, 16, 64, 512)
ROTATION_BYTES = 220_000_000
EXPERT_GROUPS = (
    (5, 0.05),
    (4, 0.15),
    (3, 0.52),
    (2, 0.28),
)  # share of the rows: 3.03 bits a weight in groups of 64


@dataclass(frozen=True)
class Linear:
    """A repacked random linear.

    Attributes:
        block: what the kernels read.
        stored_bytes: of its tensors in the file.
        shape: K, N.
    """

    block: Block
    stored_bytes: int
    shape: tuple[int, int]

    @property
    def body(self) -> Tensor:
        """The bytes that a product reads."""
        assert isinstance(self.block.body, Tensor)
        return self.block.body


def random_linear(shape: tuple[int, int], groups: list[tuple[int, int]]) -> Linear:
    """A linear of random codes, scales and permutation; `groups` are (bits, rows)."""
    k, n = shape
    table, word = [], 0
    for bits, rows in groups:
        table += [bits, word]
        word += rows * bits // 32
    low, high = -(2**31), 2**31 - 1
    stored = Stored(
        torch.randint(low, high, (word, n), dtype=torch.int32),
        torch.randint(low, high, (len(groups), n // 8), dtype=torch.int32),
        (torch.rand(len(groups)) * 0.02 + 0.01).half(),
        torch.tensor(table, dtype=torch.int16),
        torch.randperm(k).int(),
    )
    struct = describe_linear(stored, None, n)
    block = repack(struct)
    assert block is not None
    return Linear(block, sum(tensor.nbytes for tensor in stored), shape)


def uniform_groups(k: int, bits: int, rows: int) -> list[tuple[int, int]]:
    """Groups of one width."""
    return [(bits, rows)] * (k // rows)


def mixed_groups(k: int, rows: int = 64) -> list[tuple[int, int]]:
    """Groups of the widths of EXPERT_GROUPS."""
    total = k // rows
    counts = [round(share * total) for _, share in EXPERT_GROUPS]
    counts[-1] = total - sum(counts[:-1])
    return [
        (bits, rows) for (bits, _), count in zip(EXPERT_GROUPS, counts, strict=True) for _ in range(count)
    ]


def pointers(blocks: list[Block]) -> Any:
    """The C array of the blocks' addresses."""
    return (ctypes.c_void_p * len(blocks))(*(block.address for block in blocks))


def best(runs: Iterator[Callable[[], None]], seconds: float, least: int = 5) -> float:
    """Seconds of the fastest run, trying for `seconds`; a first run of each kind warms up."""
    next(runs)()
    fastest, start, count = float("inf"), time.perf_counter(), 0
    while count < least or time.perf_counter() - start < seconds:
        run = next(runs)
        before = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - before)
        count += 1
    return fastest


class Rotation:
    """Copies of one random linear that together are larger than the caches."""

    def __init__(self, shape: tuple[int, int], bits: int, rows: int) -> None:
        first = random_linear(shape, uniform_groups(shape[0], bits, rows))
        count = -(-ROTATION_BYTES // first.body.numel())
        again = [random_linear(shape, uniform_groups(shape[0], bits, rows)) for _ in range(count - 1)]
        self.linears = [first, *again]
        self.bytes = first.stored_bytes
        self.shape = shape

    def multiplications(self, tokens: int, mode: str) -> Iterator[Callable[[], None]]:
        """Calls that multiply one linear after the other by `tokens` random activations."""
        library, bits = _native.library(), BITS[mode]
        x = torch.randn(tokens, self.shape[0])
        y = torch.empty(tokens, self.shape[1])
        for array in cycle([pointers([linear.block]) for linear in self.linears]):

            def run(array: Any = array) -> None:
                _native.check(
                    library.dbrxq_repacked_linear(array, 1, bits, x.data_ptr(), tokens, y.data_ptr()),
                    "linear",
                )

            yield run

    def reads(self) -> Iterator[Callable[[], None]]:
        """Calls that only read one linear after the other."""
        library, total = _native.library(), ctypes.c_uint64()
        for linear in cycle(self.linears):

            def run(block: Tensor = linear.body) -> None:
                size = block.numel()
                _native.check(library.dbrxq_read_memory(block.data_ptr(), size, ctypes.byref(total)), "read")

            yield run


def measure_gemv(rotation: Rotation, mode: str, seconds: float) -> dict[str, float]:
    """One token: milliseconds, GB/s of stored bytes, the memory's GB/s, giga-weights a second."""
    took = read = float("inf")
    for _ in range(3):  # in turns, so that both meet the same neighbours
        read = min(read, best(rotation.reads(), seconds / 6))
        took = min(took, best(rotation.multiplications(1, mode), seconds / 6))
    k, n = rotation.shape
    bandwidth = rotation.linears[0].body.numel() / read / 1e9
    return {
        "ms": took * 1e3,
        "gb_per_s": rotation.bytes / took / 1e9,
        "bandwidth_gb_per_s": bandwidth,
        "share_of_bandwidth": rotation.bytes / took / 1e9 / bandwidth,
        "gweights_per_s": k * n / took / 1e9,
    }


def gemv(threads: int, mode: str, rows: int, seconds: float) -> list[dict[str, Any]]:
    """Every width and shape with one token."""
    _native.set_threads(threads)
    results: list[dict[str, Any]] = []
    for bits in WIDTHS:
        for shape in SHAPES:
            figures = measure_gemv(Rotation(shape, bits, rows), mode, seconds)
            results.append({"bits": bits, "k": shape[0], "n": shape[1], "threads": threads} | figures)
    return results


def batches(threads: int, mode: str, rows: int, seconds: float) -> list[dict[str, Any]]:
    """Every width with 1 to 512 tokens, and torch's bfloat16 on dense weights (`bits` 16)."""
    _native.set_threads(threads)
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []

    def add(bits: int, tokens: int, took: float) -> None:
        rate = 2 * tokens * HIDDEN * FFN / took / 1e9
        row = {"bits": bits, "tokens": tokens, "threads": threads, "ms": took * 1e3, "gflop_per_s": rate}
        results.append(row)

    for bits in WIDTHS:
        rotation = Rotation(SHAPES[0], bits, rows)
        for tokens in BATCHES:
            add(bits, tokens, best(rotation.multiplications(tokens, mode), seconds))
    dense = [torch.randn(FFN, HIDDEN).bfloat16() for _ in range(2)]
    for tokens in BATCHES:
        x = torch.randn(tokens, HIDDEN).bfloat16()

        def runs(x: Tensor = x) -> Iterator[Callable[[], None]]:
            for weight in cycle(dense):

                def run(weight: Tensor = weight) -> None:
                    torch.nn.functional.linear(x, weight)

                yield run

        add(16, tokens, best(runs(), seconds))
    return results


def experts_block(threads: tuple[int, ...], mode: str, seconds: float) -> list[dict[str, Any]]:
    """One DBRX block of experts, 1 and 64 tokens: milliseconds a token, and those of reading the weights."""
    shapes = (SHAPES[0], SHAPES[0], SHAPES[1])
    linears = [random_linear(shape, mixed_groups(shape[0])) for shape in shapes for _ in range(EXPERTS)]
    array = pointers([linear.block for linear in linears])
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    per_expert = sum(linear.stored_bytes for linear in linears) / EXPERTS
    library, bits = _native.library(), BITS[mode]
    total = ctypes.c_uint64()
    results: list[dict[str, Any]] = []
    for count in threads:
        _native.set_threads(count)

        def reads() -> Iterator[Callable[[], None]]:
            for linear in cycle(linears):

                def read(block: Tensor = linear.body) -> None:
                    library.dbrxq_read_memory(block.data_ptr(), block.numel(), ctypes.byref(total))

                yield read

        sizes = {linear.body.numel() for linear in linears}
        bandwidth = max(sizes) / best(reads(), seconds) / 1e9
        for tokens in (1, 64):
            x, y = torch.randn(tokens, HIDDEN), torch.empty(tokens, HIDDEN)
            generator = torch.Generator().manual_seed(0)

            def runs(tokens: int = tokens, x: Tensor = x, y: Tensor = y) -> Iterator[Callable[[], None]]:
                while True:
                    chosen = [torch.randperm(EXPERTS, generator=generator)[:ACTIVE] for _ in range(tokens)]  # noqa: B023
                    index, share = torch.stack(chosen), torch.rand(tokens, ACTIVE)

                    def run(index: Tensor = index, share: Tensor = share) -> None:
                        status = library.dbrxq_repacked_experts(
                            array, EXPERTS, bits, x.data_ptr(), index.data_ptr(), share.data_ptr(),
                            tokens, HIDDEN, ACTIVE, _abi.ACTIVATIONS["silu"], y.data_ptr(),
                        )  # fmt: skip
                        _native.check(status, "experts")

                    yield run

            took = best(runs(), seconds)
            row = {"threads": count, "tokens": tokens, "ms_per_token": took * 1e3 / tokens}
            row |= {"bits_per_weight": per_expert * EXPERTS * 8 / weights, "bandwidth_gb_per_s": bandwidth}
            row["floor_ms_per_token"] = min(EXPERTS, ACTIVE * tokens) * per_expert / bandwidth / 1e6 / tokens
            results.append(row)
    return results


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, JSON-ready."""
    torch.manual_seed(0)
    threads = (arguments.threads,) if arguments.threads else (1, 2)
    mode, seconds = arguments.activations, arguments.seconds
    report: dict[str, Any] = {
        "isa": _native.isa(),
        "activations": mode,
        "group_rows": arguments.group,
        "gemv": [row for count in threads for row in gemv(count, mode, arguments.group, seconds)],
        "batches": [row for count in threads for row in batches(count, mode, arguments.group, seconds)],
    }
    report["experts"] = experts_block(threads, mode, seconds)
    report["gemv_share_of_bandwidth"] = {
        str(bits): min(row["share_of_bandwidth"] for row in report["gemv"] if row["bits"] == bits)
        for bits in WIDTHS
    }
    if arguments.llama:
        from dbrx_quant.scripts.dev.bench_llama import measure_llama

        report["llama"] = [row for count in threads for row in measure_llama(arguments.llama, count, seconds)]
        report["times_llama"] = compare(report["gemv"], report["llama"])
    return report


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Giga-weights a second over llama.cpp's in the worst of threads and shapes: {"4/Q4_K": 1.7, ...}."""
    ratios: dict[str, float] = {}
    for other in theirs:
        bits = int(other["type"][1])
        same = ("k", "n", "threads")
        (row,) = (r for r in ours if r["bits"] == bits and all(r[key] == other[key] for key in same))
        name, ratio = f"{bits}/{other['type']}", row["gweights_per_s"] / other["gweights_per_s"]
        ratios[name] = min(ratio, ratios.get(name, ratio))
    return ratios


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    print(
        f"instruction set {report['isa']}, activations {report['activations']}, "
        f"groups of {report['group_rows']}"
    )
    rows = [
        [
            f"{r['threads']}", f"{r['k']} x {r['n']}", f"{r['bits']}", f"{r['ms']:.3f}",
            f"{r['gb_per_s']:.1f}", f"{r['bandwidth_gb_per_s']:.1f}", f"{r['share_of_bandwidth']:.0%}",
            f"{r['gweights_per_s']:.1f}",
        ]
        for r in report["gemv"]
    ]  # fmt: skip
    print_table(
        "one token", ["threads", "K x N", "bits", "ms", "GB/s", "memory", "share", "Gw/s"], rows, left=2
    )
    rows = [
        [f"{r['threads']}", "bf16, torch" if r["bits"] == 16 else f"{r['bits']} bits", f"{r['tokens']}",
         f"{r['ms']:.2f}", f"{r['gflop_per_s']:.0f}"]
        for r in report["batches"]
    ]  # fmt: skip
    print_table(f"{HIDDEN} x {FFN}", ["threads", "weights", "tokens", "ms", "GFLOP/s"], rows, left=2)
    rows = [
        [f"{r['threads']}", f"{r['tokens']}", f"{r['bits_per_weight']:.2f}", f"{r['ms_per_token']:.2f}",
         f"{r['floor_ms_per_token']:.2f}", f"{r['floor_ms_per_token'] / r['ms_per_token']:.0%}"]
        for r in report["experts"]
    ]  # fmt: skip
    heads = ["threads", "tokens", "bits a weight", "ms a token", "reading them", "share"]
    print_table(f"a block of {EXPERTS} experts, {ACTIVE} active", heads, rows)
    for row in report.get("llama", ()):
        print(f"llama.cpp {row['type']}, {row['threads']} threads, {row['k']} x {row['n']}: "
              f"{row['ms']:.3f} ms, {row['gweights_per_s']:.1f} Gw/s")  # fmt: skip
    for name, ratio in report.get("times_llama", {}).items():
        print(f"weights a second, {name}: {ratio:.2f} times llama.cpp")


def plot(report: dict[str, Any], file: Path) -> None:
    """Shares of the bandwidth and the batch curves as a picture; needs matplotlib."""
    pyplot = importlib.import_module("matplotlib.pyplot")  # by name: an optional library, unknown to checkers
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for threads in sorted({row["threads"] for row in report["gemv"]}):
        rows = [r for r in report["gemv"] if r["threads"] == threads and r["k"] == HIDDEN]
        shares = [100 * r["share_of_bandwidth"] for r in rows]
        left.plot([r["bits"] for r in rows], shares, "o-", label=f"{threads} threads")
    left.set(xlabel="bits", ylabel="% of the read bandwidth", title="one token", ylim=(0, 110))
    left.legend()
    threads = max(row["threads"] for row in report["batches"])
    for bits in sorted({row["bits"] for row in report["batches"]}):
        rows = [r for r in report["batches"] if r["bits"] == bits and r["threads"] == threads]
        label = "bf16, torch" if bits == 16 else f"{bits} bits"
        right.loglog([r["tokens"] for r in rows], [r["gflop_per_s"] for r in rows], "o-", label=label)
    right.set(xlabel="tokens", ylabel="GFLOP/s", title=f"{HIDDEN} x {FFN}, {threads} threads")
    right.legend()
    figure.tight_layout()
    figure.savefig(file)


@quiet_on_closed_pipe
def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, help="measure with this many only (default: 1 and 2)")
    parser.add_argument("--activations", choices=tuple(BITS), default="int8")
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=64, help="rows of a group")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure (default: 1)")
    parser.add_argument("--llama", type=Path, help="folder with llama.cpp's ggml libraries, to compare with")
    parser.add_argument("--plot", type=Path, help="write a picture here (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    report = measure(arguments)
    record("kernels", arguments, report)
    if arguments.plot:
        plot(report, arguments.plot)
    if arguments.json:
        print_json(report)
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
