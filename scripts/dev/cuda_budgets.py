"""Holds the compiled CUDA kernels against written budgets: what can be proved about speed without a GPU.

`python -m dbrx_quant.scripts.dev.cuda_budgets [--arch 80 90 …]` compiles csrc/cuda/*.cu with nvcc, reads
registers, spills and shared memory from ptxas, and from the machine code (cuobjdump or nvdisasm, if found;
`pip install -e '.[cuda-tools]'` brings them) the instructions per weight of each main loop and the width of
its loads. It exits with 3 when a budget is broken, 2 when nvcc is missing.

The instructions of a loop are counted as written, branches that are seldom taken (a new group's scales, 0.4 a
weight) included: an upper bound. One HMMA (mma.m16n8k16) takes 256 weights, 8 a lane, and one of Turing
(mma.m16n8k8) half of that, so a loop's weights follow from its HMMAs. What the bound means: a multiprocessor
issues 4 warp instructions a cycle, 128 of lanes; w weights a second at n instructions take w n of them. H100
(132 at 1.7 GHz): 28.7e12 a second, against 6.7e12 weights of 4 bits at 3.35 TB/s; A100 (108 at 1.41 GHz):
19.5e12 against 4.1e12 at 2.04 TB/s.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BROKEN, MISSING = 3, 2
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class Budget:
    """What a kernel may take.

    Attributes:
        registers: of a thread; with the launch bounds they decide how many blocks are resident.
        shared: bytes of static shared memory of a block.
        instructions: of a lane per weight, by width, in the loop with the width's matrix products; those
            products of further tiles of 8 tokens left out.
        spills: bytes of spill stores and loads in the code, and the most of stack.
        vector_loads: the least share of the main loops' bytes that come by loads of 16 bytes a lane.
    """

    registers: int
    shared: int
    instructions: dict[int, float] = field(default_factory=dict)
    vector_loads: float = 0.0
    spills: int = 0


_EXACT = {8: 2.8, 6: 3.05, 5: 2.9, 4: 2.45, 3: 2.55, 2: 2.35}
_FOLDED = {8: 2.15, 6: 2.4, 5: 2.25, 4: 1.75, 3: 1.95, 2: 1.6}

# One row a kernel: (name, template arguments) -> budget.
BUDGETS: dict[str, Budget] = {
    # Up to 8 rows: 3 blocks of 128 threads on a multiprocessor leave 168 registers.
    "gemv 8 rows": Budget(168, 9 * 1024, {8: 2.85, 6: 3.1, 5: 2.9, 4: 2.6, 3: 2.7, 2: 2.5}, 0.8),
    "gemv 8 rows gated": Budget(168, 9 * 1024, {8: 2.85, 6: 3.1, 5: 2.9, 4: 2.6, 3: 2.7, 2: 2.5}, 0.8),
    # Up to 16 rows: 2 blocks of 128 threads leave 255 registers.
    "gemv 16 rows": Budget(255, 17 * 1024, {8: 3.0, 6: 3.3, 5: 3.1, 4: 2.7, 3: 2.8, 2: 2.6}, 0.8),
    "gemv 16 rows gated": Budget(255, 17 * 1024, {8: 3.0, 6: 3.3, 5: 3.1, 4: 2.7, 3: 2.8, 2: 2.6}, 0.8),
    # Few rows with everything inside: 3 blocks again, which share 100 KiB on the smallest
    # multiprocessor. The folded keep a few addresses of outer loops in memory.
    **{f"few {task}": Budget(168, 31 * 1024, _EXACT, 0.8) for task in ("linears", "gate up", "down")},
    **{
        f"few {task} folded": Budget(168, 31 * 1024, _FOLDED, 0.8, 160)
        for task in ("linears", "gate up", "down")
    },
    # 64 rows: 2 blocks of 128 threads leave 255 registers, and half of a GPU's least shared memory (100 KiB).
    "gemm": Budget(255, 36 * 1024),
    "gemm gated": Budget(255, 48 * 1024, spills=32),  # on Turing, where a product is two
    "repack": Budget(80, 0),
    "unpack": Budget(80, 0),
    "reconstruct": Budget(72, 8 * 1024),
    "prepare": Budget(48, 1024),
    "route": Budget(40, 9 * 1024),
    "combine": Budget(40, 0),
    "probe": Budget(16, 0),
    # Of a decode step, beside its products. Attention: 4 blocks of 128 threads leave 128 registers.
    **{f"attention {kind}": Budget(128, 21 * 1024) for kind in ("float", "half", "bfloat", "byte")},
    "embed": Budget(32, 0),
    "normalise": Budget(48, 1024),
    "sample": Budget(64, 3 * 1024),
}

_UNIT_PRODUCTS = 16  # of 8 rows with a unit: 32 input channels, 128 columns
WIDTH_ORDER = (8, 6, 5, 4, 3, 2)  # of the main loops in a kernel's code


@dataclass
class Measured:
    """What the compiler made of a kernel; `loops`: (instructions a weight, share of wide loads) of each."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    loops: list[tuple[float, float]] = field(default_factory=list)


def kernel_name(mangled: str) -> str:
    """The budget's name of a kernel, from its mangled name."""
    found = re.search(r"\d+([a-z]+)_kernel(?:I((?:Li\d+E)+)E)?", mangled)
    if found is None:
        return mangled
    if found[1] == "attention":
        kind = re.search(r"Stored([A-Z][a-z]+)E", mangled)
        return f"attention {kind[1].lower() if kind else '?'}"
    if found[1] == "few":
        task = re.search(r"Few([A-Za-z]+)ELb([01])", mangled)
        words = re.sub(r"(?<!^)([A-Z])", r" \1", task[1]).lower() if task else "?"
        return f"few {words}" + (" folded" if task and task[2] == "1" else "")
    arguments = [int(value) for value in re.findall(r"Li(\d+)E", found[2] or "")]
    if found[1] == "gemv":
        return f"gemv {8 * arguments[0]} rows" + (" gated" if arguments[1] == 2 else "")
    if found[1] == "gemm":
        return "gemm gated" if arguments == [2] else "gemm"
    return found[1]


def find_tool(name: str) -> str | None:
    """A CUDA binary tool, on the path or in its Python package (nvidia-cuda-cuobjdump and -nvdisasm)."""
    found = shutil.which(name)
    if found:
        return found
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or () if package else ():
        for candidate in sorted(Path(root).glob(f"*/bin/{name}")):
            return str(candidate)
    return None


def disassemble(cubin: Path) -> str | None:
    """The machine code of a cubin, None without a disassembler."""
    for name, arguments in (("cuobjdump", ["-sass"]), ("nvdisasm", ["-c"])):
        tool = find_tool(name)
        if tool is None:
            continue
        if name == "cuobjdump" and find_tool("nvdisasm") is None:
            continue  # it calls nvdisasm
        helper = find_tool("nvdisasm")
        command = [tool, *arguments, str(cubin)]
        environment = {"PATH": f"{Path(helper).parent}:/usr/bin:/bin"} if helper else None
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout
    return None


def compile_file(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin of a source for one architecture, and what ptxas said of it."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    includes = [f"-I{CSRC / name}" for name in ("include", "common", "cuda")]
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        *includes,
        "-cubin",
        "-o",
        str(cubin),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stderr}")
    return cubin, done.stdout + done.stderr


def read_ptxas(text: str) -> dict[str, Measured]:
    """Registers, stack, spills and shared memory of each kernel, by budget name."""
    kernels: dict[str, Measured] = {}
    current = Measured()
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(kernel_name(found[1]), Measured())
        if found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        if found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) lists of each kernel, by budget name, from cuobjdump's or nvdisasm's text."""
    found: dict[str, list[tuple[int, str]]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    body: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)|^\s*\.section\s+\.text\.(\S+?),", line):
            body = found.setdefault(kernel_name(match[1] or match[2]), [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            waiting.append(match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            address = int(match[1], 16)
            labels.update((name, address) for name in waiting)
            waiting.clear()
            body.append((address, match[2].strip()))
    for listing in found.values():  # nvdisasm writes targets as labels
        for i, (address, text) in enumerate(listing):
            if label := re.search(r"`\((\.L_x_\d+)\)", text):
                listing[i] = (address, text.replace(label[0], hex(labels.get(label[1], 1 << 40))))
    return found


def loops(listing: Iterable[tuple[int, str]]) -> list[list[str]]:
    """The innermost loops that hold matrix products, in the order of their addresses."""
    listing = list(listing)
    spans = []
    for address, text in listing:
        match = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if match and int(match[1], 16) < address:
            spans.append((int(match[1], 16), address))
    bodies = []
    for first, last in sorted(spans):
        inner = any(
            first <= a and b <= last and (a, b) != (first, last) for a, b in spans if _products(listing, a, b)
        )
        if _products(listing, first, last) and not inner:
            bodies.append([text for address, text in listing if first <= address <= last])
    return bodies


def _products(listing: list[tuple[int, str]], first: int, last: int) -> int:
    return sum("HMMA" in text for address, text in listing if first <= address <= last)


def _is_main(body: list[str]) -> bool:
    """Whether a loop takes units and nothing else.

    The one that folds zero points has fewer products; a seldom branch that was moved to the end jumps back,
    and seems to be a loop of much more.
    """
    products = sum("HMMA" in text for text in body)
    return products >= _UNIT_PRODUCTS and len(body) <= 4 * 8 * products


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _bytes(load: str) -> int:
    for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".U8", 1)):
        if suffix in load:
            return size
    return 4


def weigh_loop(body: list[str], token_tiles: int) -> tuple[float, float]:
    """Instructions a weight, and the share of the bytes that come by loads of 16 bytes a lane."""
    opcodes = [_opcode(text) for text in body]
    products = [code for code in opcodes if code.startswith("HMMA")]
    weights = sum(4 if ".1688." in code else 8 for code in products) / token_tiles
    loads = [_bytes(code) for code in opcodes if code.startswith(("LDG", "LD."))]
    wide = sum(size for size in loads if size == 16)
    own = len(opcodes) - len(products) * (token_tiles - 1) / token_tiles
    return own / weights, wide / sum(loads) if loads else 1.0


def measure(nvcc: str, arch: str, folder: Path, jobs: int = 1) -> tuple[dict[str, Measured], bool]:
    """All kernels for one architecture, and whether their machine code could be read."""
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    kernels: dict[str, Measured] = {}
    readable = True
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(lambda source: compile_file(nvcc, source, arch, folder), sources))
    for cubin, report in compiled:
        own = read_ptxas(report)
        kernels.update(own)
        if not any(name.startswith(("gemv", "few")) for name in own):
            continue
        sass = disassemble(cubin)
        if sass is None:
            readable = False
            continue
        for name, listing in functions(sass).items():
            tiles = 2 if " 16 " in name else 1
            kernels[name].loops = [weigh_loop(body, tiles) for body in loops(listing) if _is_main(body)]
    return kernels, readable


def broken_budgets(kernels: dict[str, Measured], readable: bool) -> list[str]:
    """What exceeds its budget, one line each; kernels without a budget count as broken."""
    faults = [f"{name}: not compiled" for name in BUDGETS if name not in kernels]
    for name, found in kernels.items():
        budget = BUDGETS.get(name)
        if budget is None:
            faults.append(f"{name}: has no budget")
            continue
        limits = [
            ("registers", found.registers, budget.registers),
            ("bytes spilled", found.spills, budget.spills),
        ]
        limits += [
            ("bytes of stack", found.stack, budget.spills),
            ("bytes of shared memory", found.shared, budget.shared),
        ]
        faults += [
            f"{name}: {value} {what}, budget {limit}" for what, value, limit in limits if value > limit
        ]
        if not readable or not budget.instructions:
            continue
        if len(found.loops) != len(WIDTH_ORDER):
            faults.append(f"{name}: {len(found.loops)} main loops, expected one a width")
            continue
        for width, (instructions, wide) in zip(WIDTH_ORDER, found.loops, strict=True):
            limit = budget.instructions[width]
            if instructions > limit:
                faults.append(
                    f"{name}: {instructions:.2f} instructions a weight at {width} bits, budget {limit}"
                )
            if wide < budget.vector_loads:
                faults.append(f"{name}: {wide:.0%} of the bytes at {width} bits come 16 bytes at a time")
    return faults


def print_kernels(arch: str, kernels: dict[str, Measured]) -> None:
    """One line a kernel."""
    print(
        f"sm_{arch:<4} {'registers':>18} {'spills':>7} {'shared':>7}  "
        f"instructions a weight (16-byte loads) at {', '.join(map(str, WIDTH_ORDER))} bits"
    )
    for name in BUDGETS:
        if name in kernels:
            k = kernels[name]
            costs = "  ".join(f"{cost:.2f} ({wide:.0%})" for cost, wide in k.loops)
            print(f"  {name:<18} {k.registers:>6} {k.spills:>7} {k.shared:>7}  {costs}")


@quiet_on_closed_pipe
def main(arguments: list[str] | None = None) -> int:
    """Measure, print, compare; the exit status."""
    parser = argparse.ArgumentParser(description="Hold the compiled CUDA kernels against their budgets.")
    parser.add_argument(
        "--arch", nargs="+", default=list(ARCHITECTURES), help="compute capabilities, such as 80 90"
    )
    parser.add_argument("--jobs", type=int, default=1, help="sources compiled at a time")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print(
            "nvcc is not on the path: install the CUDA toolkit to check the kernels' budgets", file=sys.stderr
        )
        return MISSING
    faults: list[str] = []
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch:
            kernels, readable = measure(nvcc, arch, Path(folder), options.jobs)
            figures[arch] = {name: vars(kernel) for name, kernel in kernels.items()}
            if not options.json:
                print_kernels(arch, kernels)
                if not readable:
                    print(
                        "  no cuobjdump or nvdisasm: machine code not read (pip install -e '.[cuda-tools]')"
                    )
            faults += [f"sm_{arch} {fault}" for fault in broken_budgets(kernels, readable)]
    if options.json:
        print(json.dumps({"kernels": figures, "broken": faults}, indent=1, sort_keys=True))
    for fault in faults:
        print(f"over budget: {fault}", file=sys.stderr)
    return BROKEN if faults else 0


if __name__ == "__main__":
    sys.exit(main())
