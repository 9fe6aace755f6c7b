"""How fast DBRX is predicted to decode with a part of its experts on a GPU and the others in main memory.

    python -m dbrx_quant.scripts.full_size.split_speeds [--bpw 3.0] [--context 4096] [--python-ms 0] [--json]

Prints the tables of docs/dbrx.md: cards against bandwidths of main memory; nothing is run. A block takes the
GPU's time for attention, then whichever takes longer, the GPU's experts or the host's, which start after
their inputs have crossed; then the sums cross back. Time is bytes by bandwidth, of which both reach the same
part. Each of a token's choices is on the host with the same chance, the host's share of the traffic. The CPU
alone takes native steps, without Python between the blocks.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbrx_quant.quantize.budget.allocate import HEAD_OVERHEAD_BITS
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.folder.sizes import cache_bytes
from dbrx_quant.runtime.hybrid.gpu_bytes import Batch, workspace_bytes
from dbrx_quant.runtime.hybrid.plan import resident_experts, traffic
from dbrx_quant.scripts.dev.dbrx_sizes import GIB, HEAD_BITS, dbrx
from dbrx_quant.scripts.full_size.weights import SKEW
from dbrx_quant.scripts.terminal.output import print_json, quiet_on_closed_pipe

CARDS = {  # GiB → a card of that size, and its bandwidth in bytes a second
    12: ("RTX 3060", 360e9),
    16: ("RTX 4080", 717e9),
    24: ("RTX 3090", 936e9),
    48: ("RTX A6000", 768e9),
}
HOSTS = (50e9, 80e9, 100e9, 200e9, 400e9)  # bytes a second that main memory reads
REACHED = 0.8  # of either bandwidth: what the CPU kernels do, and what the GPU's are modelled to do
OUTWARD, BACK = 30e-6, 20e-6  # seconds: three small copies and the wait for them; a copy and an addition
TAKEN = 0.8e9  # of a card, by CUDA itself and the screen
MEASURED = (  # choices of each expert in the two blocks of the small DBRX (tests/data), in per cent
    (7.61, 6.28, 5.68, 5.30, 6.62, 6.47, 7.74, 5.24, 6.36, 6.64, 6.07, 7.01, 6.58, 5.89, 5.05, 5.48),
    (5.82, 6.03, 6.94, 6.74, 5.48, 5.37, 6.20, 7.71, 6.89, 6.77, 5.31, 6.65, 5.75, 7.37, 5.19, 5.78),
)
_DRAWN = 20000  # tokens of the steep use

Use = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Parts:
    """Bytes of a model at some bits per weight.

    Attributes:
        attention: of a block, with its router and norms.
        expert: of one.
        head: of the head.
    """

    attention: float
    expert: float
    head: float


def parts_of(architecture: Architecture, bpw: float) -> Parts:
    """The parts, with all linears of the decoder at the same bits."""
    block = architecture.blocks[0]
    assert block.experts is not None
    attention = sum(math.prod(spec.shape) for stage in block.stages for spec in stage) * bpw / 8
    floats = sum(2 * math.prod(kept.shape) for kept in block.floats)
    expert = sum(math.prod(spec.shape) for spec in block.experts.linears[0]) * bpw / 8
    head = (HEAD_BITS + HEAD_OVERHEAD_BITS) * math.prod(architecture.head.shape) / 8
    return Parts(attention + floats, expert, head)


def uses(blocks: int, experts: int, active: int) -> dict[str, Use]:
    """Kind of use → block → the chance of each expert."""
    measured = [[active * share / sum(shares) for share in shares] for shares in MEASURED]
    return {
        "alike": {block: (active / experts,) * experts for block in range(blocks)},
        "small DBRX": {block: measured[block % 2] for block in range(blocks)},
        "steep": dict.fromkeys(range(blocks), steep_use(experts, active)),
    }


def steep_use(experts: int, active: int) -> tuple[float, ...]:
    """The chances that the router of the synthetic model (`weights.py`) is given, an assumption."""
    import torch

    liking = SKEW * torch.special.ndtri((torch.arange(experts) + 0.5) / experts)
    logits = liking + torch.randn(_DRAWN, experts, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(logits.topk(active).indices.flatten(), minlength=experts)
    return tuple((counts / _DRAWN).tolist())


def resident(
    architecture: Architecture, parts: Parts, use: Use, card: float, context: int
) -> tuple[int, float]:
    """Experts of all blocks that a card of so many bytes holds, and their part of the traffic."""
    workspace = workspace_bytes(architecture, Batch(context, 1, 2))
    common = len(use) * parts.attention + parts.head
    room = card - TAKEN - workspace - cache_bytes(architecture, context) - common
    sizes = {block: (round(parts.expert),) * len(chances) for block, chances in use.items()}
    kept = resident_experts(int(room), use, sizes)
    every = {block: range(len(chances)) for block, chances in use.items()}
    return sum(map(len, kept.values())), traffic(kept, use, sizes) / traffic(every, use, sizes)


def token_seconds(
    parts: Parts, blocks: int, active: int, share: float, gpu: float, host: float, python: float = 0.0
) -> float:
    """Seconds a token.

    Args:
        parts: the model's.
        blocks: their number.
        active: experts of a token.
        share: part of the experts' traffic that is on the GPU.
        gpu: bytes a second of its memory.
        host: likewise of main memory.
        python: seconds of Python a block, during which nothing is computed.
    """
    fast, slow = REACHED * gpu, REACHED * host
    block = parts.attention / fast + python
    for there in range(active + 1):  # choices on the host
        chance = math.comb(active, there) * (1 - share) ** there * share ** (active - there)
        crossing = OUTWARD + (BACK if there else 0) if share < 1 else 0.0
        seconds = max((active - there) * parts.expert / fast, there * parts.expert / slow + crossing)
        block += chance * seconds
    return blocks * block + parts.head / fast


@quiet_on_closed_pipe
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bpw", type=float, default=3.0, help="bits per weight (default: %(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="of the cache (default: %(default)s)")
    parser.add_argument("--python-ms", type=float, default=0.0, help="a block (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    given = parser.parse_args(arguments)
    architecture = dbrx()
    parts = parts_of(architecture, given.bpw)
    experts = architecture.blocks[0].experts
    assert experts is not None
    blocks, active, python = len(architecture.blocks), experts.active, given.python_ms / 1000
    kinds = uses(blocks, experts.count, active)
    rows: list[dict[str, Any]] = []
    for gib, (name, bandwidth) in CARDS.items():
        held = {
            kind: resident(architecture, parts, use, gib * GIB, given.context) for kind, use in kinds.items()
        }
        speeds = [
            {
                kind: 1 / token_seconds(parts, blocks, active, share, bandwidth, host, python)
                for kind, (_, share) in held.items()
            }
            for host in HOSTS
        ]
        rows.append({"gib": gib, "card": name, "held": held, "tokens_per_second": speeds})
    read = blocks * (parts.attention + active * parts.expert) + parts.head
    alone = [REACHED * host / read for host in HOSTS]
    if given.json:
        print_json({"rows": rows, "cpu_alone": alone, "bytes_per_token": read})
        return 0
    print(f"| card | experts there | of their traffic | {' | '.join(f'{h / 1e9:.0f} GB/s' for h in HOSTS)} |")
    print(f"|---|---|---|{'---|' * len(HOSTS)}")
    print(f"| none | 0 | - | {' | '.join(_pace(rate) for rate in alone)} |")
    for row in rows:
        counts = row["held"]["alike"][0]
        shares = " / ".join(f"{100 * share:.0f}" for _, share in row["held"].values())
        cells = " | ".join(" / ".join(map(_pace, speed.values())) for speed in row["tokens_per_second"])
        named = f"{row['gib']} GiB ({row['card']})"
        print(f"| {named} | {counts} of {blocks * experts.count} | {shares} % | {cells} |")
    return 0


def _pace(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
