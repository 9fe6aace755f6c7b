"""Predicts what share of a GPU's memory bandwidth products of a decode step reach: a model, nothing is run.

`python -m dbrx_quant.scripts.gpu.bandwidth_model [--gpu H100 …] [--bits 2 3 4]` prints a table: products of
DBRX's sizes for one token, with blocks in waves and exact halves (csrc/cuda/gemv.cu) and in equal shares with
folded weights (csrc/cuda/few).

The model follows every unit (32 input channels by 128 columns) of every warp. Two things serve units
one after another: the memory, at 92 % of its peak and with a latency; and the quarter of a
multiprocessor that a warp is on, for as long as its busiest part takes (instructions issued, tensor
cores, packed halves, integers). A warp has a few units' words under way, and takes a unit no faster
than its instructions depend on each other. A block begins and ends with work of its own, in which it
loads no weights. Instruction counts are those of the compiled inner loops (`scripts.dev.cuda_budgets`);
latencies and rates are published or assumed, and not calibrated: take the figures as good to ten
points. Only the products and the launch that prepares activations (2 microseconds, assumed) are
modelled: no other launches, and no sums that blocks exchange.
"""

import argparse
import heapq
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

WARPS, BLOCKS_TOGETHER, QUARTERS = 4, 3, 4
PEAK_SHARE = 0.92  # of the memory's bandwidth that anything reaches
ISSUE_SHARE = 0.9
SIDE_BYTES = 1.03  # scales beside the words


@dataclass(frozen=True)
class Gpu:
    """A GPU; cycles are those of a quarter of a multiprocessor for an instruction of a warp."""

    multiprocessors: int
    ghz: float
    gigabytes: float  # a second, peak
    product_cycles: int  # mma.m16n8k16 with fp32 sums
    half_cycles: int  # packed half arithmetic
    latency: float  # ns, from the memory


GPUS = {
    "3090": Gpu(82, 1.695, 936, 32, 2, 560),
    "4090": Gpu(128, 2.52, 1008, 32, 2, 560),
    "5090": Gpu(170, 2.41, 1792, 32, 2, 600),
    "A100": Gpu(108, 1.41, 2039, 8, 1, 620),
    "H100": Gpu(132, 1.755, 3352, 8, 1, 680),
    "H200": Gpu(132, 1.755, 4800, 8, 1, 720),
}


@dataclass(frozen=True)
class Loop:
    """What a unit of some bits takes in an inner loop.

    Attributes:
        instructions: all of a lane, those for a new group left out.
        halves, integers: of these, packed half arithmetic and integer operations.
        dependent: cycles that one warp alone takes.
        depth: units whose words are under way.
    """

    instructions: int
    halves: int
    integers: int
    dependent: int
    depth: int

    def cycles(self, gpu: Gpu) -> float:
        """How long a unit keeps a quarter of a multiprocessor busy."""
        return max(
            16 * gpu.product_cycles / ISSUE_SHARE,
            self.instructions / ISSUE_SHARE,
            self.halves * gpu.half_cycles / ISSUE_SHARE,
            self.integers * 2 / ISSUE_SHARE,
        )


EXACT = {2: Loop(265, 128, 92, 640, 2), 3: Loop(289, 128, 115, 630, 2), 4: Loop(276, 128, 100, 635, 2)}
FOLDED = {2: Loop(180, 0, 90, 430, 2), 3: Loop(225, 0, 110, 450, 2), 4: Loop(195, 0, 95, 435, 2)}
GATHER = 14  # instructions a unit and token beside the loop: activations into packed order
PREPARE = 2.0  # microseconds of the launch before that prepares activations; the new products have it inside
EXACT_ENDS, SHARED_ENDS = 2500.0, 3600.0  # cycles of a block that loads no weights; 55 % come first


@dataclass(frozen=True)
class Product:
    """Matrices k x n of one token; `pairs`: gate and up at once."""

    k: int
    n: int
    count: int = 1
    pairs: bool = False

    @property
    def units(self) -> int:
        """Units of a column tile, of both matrices of a pair."""
        return self.k // 32 * (2 if self.pairs else 1)

    @property
    def tiles(self) -> int:
        """Column tiles of all matrices."""
        return -(-self.n // 128) * self.count

    def gigabytes(self, bits: int) -> float:
        """What must be read."""
        return self.tiles * 128 * self.units * 32 * bits / 8 * SIDE_BYTES / 1e9


PRODUCTS = {
    "q, k, v": Product(6144, 8192),
    "output": Product(6144, 6144),
    "gate, up of 4 experts": Product(6144, 10752, 4, pairs=True),
    "down of 4 experts": Product(10752, 6144, 4),
}


def waves(product: Product, gpu: Gpu) -> list[list[int]]:
    """Units of each warp of each block, as gemv.cu plans them: column tiles, in as many splits as fit."""
    slices = WARPS // 2 if product.pairs else WARPS
    units = product.k // 32
    splits = max(
        1, min(gpu.multiprocessors * BLOCKS_TOGETHER // product.tiles, units // (8 if product.pairs else 16))
    )
    bounds = [units * i // (slices * splits) for i in range(slices * splits + 1)]
    blocks = []
    for split in range(splits):
        own = [bounds[split * slices + w + 1] - bounds[split * slices + w] for w in range(slices)]
        blocks.append(own * (2 if product.pairs else 1))
    return blocks * product.tiles


def shares(product: Product, gpu: Gpu) -> list[list[int]]:
    """The same in equal shares for as many blocks as fit at once, as csrc/cuda/few divides them."""
    warps = gpu.multiprocessors * BLOCKS_TOGETHER * WARPS
    bounds = [product.units * product.tiles * i // warps for i in range(warps + 1)]
    units = [bounds[i + 1] - bounds[i] for i in range(warps)]
    return [units[i : i + WARPS] for i in range(0, warps, WARPS)]


def microseconds(gpu: Gpu, bits: int, blocks: Sequence[Sequence[int]], loop: Loop, ends: float) -> float:
    """The time of a launch, by following every unit of every warp."""
    memory_cycles = 512 * bits * SIDE_BYTES / (gpu.gigabytes * PEAK_SHARE / gpu.ghz)
    latency, busy = gpu.latency * gpu.ghz, loop.cycles(gpu)
    alone = max(loop.dependent, busy)
    memory_free, finished = 0.0, 0.0
    quarter_free = [[0.0] * QUARTERS for _ in range(gpu.multiprocessors)]
    left = [len(block) for block in blocks]
    arrivals: dict[tuple[int, int], list[float]] = {}
    events: list[
        tuple[float, int, int, int, int]
    ] = []  # time, block, warp, multiprocessor, unit (-1: begins)
    waiting = iter(range(len(blocks)))

    def request(time: float, block: int, warp: int) -> None:
        nonlocal memory_free
        memory_free = max(memory_free, time) + memory_cycles
        arrivals[block, warp].append(max(memory_free, time) + latency)

    def start(time: float, place: int) -> None:
        block = next(waiting, None)
        if block is None:
            return
        for warp in range(len(blocks[block])):
            arrivals[block, warp] = []
            spread = 0.9 + 0.2 * ((block * 7 + warp * 3) % 11) / 10  # blocks are not in step
            heapq.heappush(events, (time + 0.55 * ends * spread, block, warp, place, -1))

    for i in range(gpu.multiprocessors * BLOCKS_TOGETHER):
        start(0.0, i % gpu.multiprocessors)
    while events:
        time, block, warp, place, unit = heapq.heappop(events)
        units = blocks[block][warp]
        if unit < 0:
            for _ in range(min(loop.depth, units)):
                request(time, block, warp)
            first = arrivals[block, warp][0] if units else time
            heapq.heappush(events, (first, block, warp, place, 0))
            continue
        if unit >= units:
            left[block] -= 1
            if left[block] == 0:
                finished = max(finished, time + 0.45 * ends)
                start(time + 0.45 * ends, place)
            continue
        begins = max(quarter_free[place][warp], time)
        quarter_free[place][warp] = begins + busy
        done = max(begins + busy, time + alone)
        if unit + loop.depth < units:
            request(done if loop.depth == 1 else time + 0.35 * busy, block, warp)
        ready = arrivals[block, warp][unit + 1] if unit + 1 < units else done
        heapq.heappush(events, (max(done, ready), block, warp, place, unit + 1))
    return finished / gpu.ghz / 1e3


def share_of_bandwidth(gpu: Gpu, bits: int, product: Product, few: bool) -> float:
    """What a launch reads a second, by the memory's peak."""
    plan: Callable[[Product, Gpu], list[list[int]]] = shares if few else waves
    loop = FOLDED[bits] if few else EXACT[bits]
    if few:
        loop = Loop(loop.instructions + GATHER, loop.halves, loop.integers, loop.dependent, loop.depth)
    time = microseconds(gpu, bits, plan(product, gpu), loop, SHARED_ENDS if few else EXACT_ENDS)
    time += 0 if few else PREPARE
    return product.gigabytes(bits) / (time * 1e-6) / gpu.gigabytes


@quiet_on_closed_pipe
def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Predict the share of memory bandwidth of decode products.")
    parser.add_argument(
        "--gpu", nargs="+", choices=list(GPUS), default=list(GPUS), help="GPUs to predict for"
    )
    parser.add_argument("--bits", nargs="+", type=int, choices=sorted(EXACT), default=sorted(EXACT))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    rows = [
        {
            "gpu": name,
            "bits": bits,
            "product": what,
            "waves": round(share_of_bandwidth(GPUS[name], bits, product, few=False), 3),
            "shares": round(share_of_bandwidth(GPUS[name], bits, product, few=True), 3),
        }
        for name in options.gpu
        for what, product in PRODUCTS.items()
        for bits in options.bits
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("Predicted share of peak memory bandwidth, 1 token: waves -> equal shares. Never run on a GPU.")
    for row in rows:
        head = f"{row['gpu']:>5} {row['bits']} bits  {row['product']:<22}"
        print(f"{head} {row['waves']:>5.0%} -> {row['shares']:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
