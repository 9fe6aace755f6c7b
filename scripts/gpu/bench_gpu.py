"""Builds, checks and times every CUDA kernel on a real GPU: `python -m dbrx_quant.scripts.gpu.bench_gpu`.

One command for the day there is a GPU. It compiles csrc/cuda for that GPU, holds every kernel to the
plain-torch reference, then times them at DBRX's shapes with weights rotating through more memory than the L2
holds. Beside each time stands the bandwidth of the packed bytes it reads and its share of the bandwidth of a
plain copy on the same GPU. Then forty layers of DBRX's shapes decode (`decode_speed`), and at the end come
the steps of converting one expert there and on the CPU (`bench_device`). Exit status: 0, 3 when a kernel is
wrong, 2 without a GPU or a compiler.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HIDDEN, FFN, EXPERTS, ACTIVE = 6144, 10752, 16, 4
ROTATED_BYTES = 512 << 20
WRONG, MISSING = 3, 2
DEVICE = "cuda"  # the tests check the checks on the emulator


def build(folder: Path, arch: str) -> Path:
    """The CUDA library compiled for one architecture into `folder`.

    Raises:
        RuntimeError: nvcc is missing or fails.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    library = folder / "libdbrxq_cuda.so"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += [f"-I{CSRC / name}" for name in ("include", "common", "cuda")]
    command += [
        "-shared",
        "-cudart",
        "static",
        "-o",
        str(library),
        *map(str, sorted((CSRC / "cuda").rglob("*.cu"))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}")
    return library


def random_linear(k: int, n: int, groups: list[tuple[int, int]], seed: int) -> dict[str, Any]:
    """The stored tensors of a random linear on the GPU; `groups` is [(bits, rows), …]."""
    import torch

    generator = torch.Generator(DEVICE).manual_seed(seed)
    table, word = [], 0
    for bits, rows in groups:
        table += [bits, word]
        word += rows * bits // 32

    def words(*shape: int) -> torch.Tensor:
        made = torch.randint(
            -(2**31), 2**31 - 1, shape, generator=generator, device=DEVICE, dtype=torch.int64
        )
        return made.int()

    return {
        "q_weight": words(word, n),
        "q_scale": words(len(groups), n // 8),
        "q_scale_max": (torch.rand(len(groups), generator=generator, device=DEVICE) * 0.01).half(),
        "q_groups": torch.tensor(table, dtype=torch.int16, device=DEVICE),
        "q_invperm": torch.randperm(k, generator=generator, device=DEVICE).int(),
    }


def uniform(k: int, bits: int, rows: int = 128) -> list[tuple[int, int]]:
    """Groups of one width."""
    return [(bits, min(rows, k - start)) for start in range(0, k, rows)]


def mixed(k: int) -> list[tuple[int, int]]:
    """Codes of 3.1 bits on average: an eighth of the rows at 4 bits, the others at 3."""
    better = k // 1024 * 128  # an eighth of the rows
    return uniform(better, 4) + uniform(k - better, 3)


def packed_bytes(tensors: dict[str, Any]) -> int:
    """Bytes that a product has to read of a linear."""
    return sum(tensors[name].nbytes for name in ("q_weight", "q_scale", "q_scale_max"))


def seconds(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Seconds a call of calls that are made one after another, the median of `repeats` rounds."""
    import torch

    event: Any = torch.cuda.Event
    times: list[float] = []
    for call in calls:
        call()
    for _ in range(repeats):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def graphed(calls: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """The calls captured in one CUDA graph, without the cost of launching them from Python."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [graph.replay]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)] * 10)


def _backends() -> tuple[Any, Any]:
    """The modules with the operators on CUDA and in plain torch."""
    from dbrx_quant.runtime.kernels import cuda, reference

    return cuda, reference


def check() -> list[str]:
    """Differences from the reference beyond rounding, one line each."""
    import torch

    from dbrx_quant.runtime.kernels.stored import Stored

    cuda, reference = _backends()
    faults = []
    groups = [(8, 32), (6, 64), (5, 64), (4, 128), (3, 448), (2, 304)]
    stored = Stored.of(random_linear(1040, 1056, groups, 0))
    if not torch.equal(cuda.dequantize(stored, 1050), reference.dequantize(stored, 1050)):
        faults.append("dequantize: weights differ")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}[dtype]
        for tokens in (1, 8, 9, 16, 17, 64, 65, 300):
            x = torch.randn(tokens, 1040, device=DEVICE).to(dtype)
            ours = cuda.linear(x, stored, None, 1050).double()
            expected = reference.linear(x.float(), stored, None, 1050).double()
            error = ((ours - expected).abs().max() / expected.abs().max()).item()
            if not error <= tolerance:
                faults.append(f"linear: {dtype}, {tokens} tokens: error {error:.2e} of the largest output")
        lists = _experts(4, 256, 416, lambda k: uniform(k, 3))
        for tokens in (1, 7, 33, 300):
            x = torch.randn(tokens, 256, device=DEVICE).to(dtype)
            index = torch.randint(0, 5, (tokens, 2), device=DEVICE)
            weights = torch.rand(tokens, 2, device=DEVICE)
            ours = cuda.experts(x, index, weights, *lists, "silu").double()
            expected = reference.experts(x.float(), index, weights, *lists, "silu").double()
            error = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
            if not error <= 2 * tolerance:
                faults.append(f"experts: {dtype}, {tokens} tokens: error {error:.2e} of the largest output")
    return faults


def _experts(count: int, hidden: int, ffn: int, groups: Callable[[int], list[tuple[int, int]]]) -> Any:
    """Three lists, gate, up and down of `count` experts, as the backends take them."""
    from dbrx_quant.runtime.kernels.stored import StoredList

    shapes = ((hidden, ffn), (hidden, ffn), (ffn, hidden))
    return [
        StoredList.of(random_linear(k, n, groups(k), 3 * e + role) for e in range(count))
        for role, (k, n) in enumerate(shapes)
    ]


def time_linears() -> list[dict[str, Any]]:
    """A linear at every width and number of tokens, in a CUDA graph and from Python."""
    import torch

    from dbrx_quant.runtime.kernels.stored import Stored

    cuda, _ = _backends()
    rows = []
    for k, n in ((HIDDEN, FFN), (FFN, HIDDEN), (HIDDEN, 1024)):
        for name, groups in [
            *((f"{b} bits", uniform(k, b)) for b in (2, 3, 4, 5, 6, 8)),
            ("mixed", mixed(k)),
        ]:
            first = random_linear(k, n, groups, 0)
            size = packed_bytes(first)
            count = max(1, min(64, ROTATED_BYTES // size))
            linears = [first, *(random_linear(k, n, groups, i) for i in range(1, count))]
            stored = [Stored.of(linear) for linear in linears]
            for tokens in (1, 2, 4, 8, 16, 64, 512) if name in ("4 bits", "mixed") else (1, 8):
                x = torch.randn(tokens, k, device=DEVICE).half()
                calls: list[Callable[[], Any]] = [partial(cuda.linear, x, own, None, n) for own in stored]
                time = seconds(graphed(calls)) / len(calls)
                rows.append(_row(f"{k}x{n} {name}", tokens, time, size, 2 * k * n * tokens, seconds(calls)))
    return rows


def time_experts() -> list[dict[str, Any]]:
    """A whole DBRX block of experts at about 3 bits a weight."""
    import torch

    cuda, _ = _backends()
    lists = _experts(EXPERTS, HIDDEN, FFN, mixed)
    each = sum(t.nbytes for role in lists for t in role.tensors if t.dtype == torch.int32) / EXPERTS
    rows = []
    for tokens in (1, 2, 4, 8, 64, 512):
        x = torch.randn(tokens, HIDDEN, device=DEVICE).half()
        index = torch.stack([torch.randperm(EXPERTS, device=DEVICE)[:ACTIVE] for _ in range(tokens)])
        weights = torch.rand(tokens, ACTIVE, device=DEVICE)
        used = len(set(index.flatten().tolist()))
        calls: list[Callable[[], Any]] = [partial(cuda.experts, x, index, weights, *lists, "silu")]
        operations = 6 * HIDDEN * FFN * tokens * ACTIVE
        rows.append(
            _row(
                f"{used} experts",
                tokens,
                seconds(graphed(calls)),
                int(used * each),
                operations,
                seconds(calls),
            )
        )
    return rows


def _row(name: str, tokens: int, time: float, size: int, operations: int, eager: float) -> dict[str, Any]:
    return {
        "name": name,
        "tokens": tokens,
        "microseconds": time * 1e6,
        "eager_microseconds": eager * 1e6,
        "bytes_a_second": size / time,
        "operations_a_second": operations / time,
    }


def print_rows(rows: list[dict[str, Any]], bandwidth: float) -> None:
    """A table: time, bandwidth, its share of a copy's, arithmetic."""
    for row in rows:
        rate = row["bytes_a_second"]
        print(
            f"{row['name']:<22} {row['tokens']:>5} tokens {row['microseconds']:>10.1f} us "
            f"({row['eager_microseconds']:>8.1f} from Python) {rate / 1e9:>8.0f} GB/s "
            f"{rate / bandwidth:>5.0%} of a copy {row['operations_a_second'] / 1e12:>7.1f} TFLOPS"
        )


@quiet_on_closed_pipe
def main(arguments: list[str] | None = None) -> int:
    """Build, check, time; the exit status."""
    parser = argparse.ArgumentParser(
        description="Build, check and time the CUDA kernels on this machine's GPU."
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--check-only", action="store_true", help="skip the timing")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print(
            "no GPU: torch finds no CUDA device here (a torch built for CUDA and a driver are needed); "
            "the kernels still run without one in tests/runtime/kernels",
            file=sys.stderr,
        )
        return MISSING
    from dbrx_quant.runtime.kernels.device import find_device
    from dbrx_quant.runtime.library import _cuda
    from dbrx_quant.scripts.dev import bench_device
    from dbrx_quant.scripts.gpu import decode_speed

    properties = torch.cuda.get_device_properties(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build(Path(folder), f"{properties.major}{properties.minor}")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return MISSING
        _cuda.use(library)
        faults = check()
        for fault in faults:
            print(f"wrong: {fault}", file=sys.stderr)
        if faults:
            return WRONG
        if options.check_only:
            print(f"{properties.name}: every kernel agrees with the reference")
            return 0
        bandwidth = copy_bandwidth()
        rows = [*time_linears(), *time_experts()]
        decoding = decode_speed.figures(DEVICE, Path(folder) / "dbrx")
    converting = bench_device.figures(
        find_device(DEVICE), bench_device.HIDDEN, bench_device.FFN, bench_device.TOKENS
    )
    if options.json:
        figures = {"gpu": properties.name, "copy_bytes_a_second": bandwidth, "rows": rows}
        figures |= {"decoding": decoding, "converting": converting}
        print(json.dumps(figures, indent=1, sort_keys=True))
    else:
        print(f"{properties.name}: every kernel agrees with the reference")
        print(f"a copy moves {bandwidth / 1e9:.0f} GB/s")
        print_rows(rows, bandwidth)
        decode_speed.print_figures(decoding, bandwidth)
        bench_device.print_figures(converting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
