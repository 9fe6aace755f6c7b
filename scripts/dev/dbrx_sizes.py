"""What DBRX takes at each number of bits per weight, and the bits that a memory allows (docs/dbrx.md).

`python -m dbrx_quant.scripts.dev.dbrx_sizes` prints Markdown. The sums are those of
`convert --dry-run`, for the shapes of dbrx-base and dbrx-instruct; the 264 GB of weights need not be there.
"""

import argparse
import math
from collections.abc import Sequence

from dbrx_quant.quantize.estimate.memory import peak_bytes, states_bytes
from dbrx_quant.quantize.estimate.sizes import (
    decoder_weights,
    fixed_bytes,
    shape_range,
    total_bytes,
)
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.folder.sizes import cache_bytes
from dbrx_quant.scripts.terminal.output import print_json, quiet_on_closed_pipe

BPWS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.25, 5.0, 6.0)
CONTEXTS = (4096, 8192)
MEMORIES = (48, 64, 72, 80, 96, 128)  # GiB, as GPUs and machines are sold
TOKENS = ((32, 256), (128, 256), (128, 512), (128, 2048))  # calibration rows and their length
HEAD_BITS = 6  # convert's default
SPARE = 0.05  # of the memory, for activations and fragmentation
GIB = 2**30


def dbrx() -> Architecture:
    """The architecture with the dimensions of dbrx-base and dbrx-instruct."""
    from transformers import DbrxConfig

    config = DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=40,
        vocab_size=100352,
        attn_config={"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config.architectures = ["DbrxForCausalLM"]
    return describe(config)


def memory_bytes(architecture: Architecture, bpw: float, context: int) -> int:
    """Memory for all weights, embedding included, and a cache of `context` tokens, with some to spare."""
    needed = total_bytes(architecture, bpw, HEAD_BITS) + cache_bytes(architecture, context)
    return int(needed / (1 - SPARE))


def most_bpw(architecture: Architecture, memory: int, context: int) -> float | None:
    """The most bits per weight, to a hundredth, that run in `memory` bytes; None where the fewest don't."""
    low, high = shape_range(architecture)
    left = (1 - SPARE) * memory - cache_bytes(architecture, context) - fixed_bytes(architecture, HEAD_BITS)
    bpw = math.floor(100 * min(8 * left / decoder_weights(architecture), high)) / 100
    return bpw if bpw >= low else None


@quiet_on_closed_pipe
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    as_json = parser.parse_args(arguments).json
    architecture = dbrx()
    low, high = shape_range(architecture)
    sizes = {bpw: total_bytes(architecture, bpw, HEAD_BITS) for bpw in BPWS}
    needed = {bpw: [memory_bytes(architecture, bpw, context) for context in CONTEXTS] for bpw in BPWS}
    most = {gib: [most_bpw(architecture, gib * GIB, context) for context in CONTEXTS] for gib in MEMORIES}
    if as_json:
        print_json(
            {
                "weights": decoder_weights(architecture),
                "lowest_bpw": low,
                "highest_bpw": high,
                "cache_bytes": {context: cache_bytes(architecture, context) for context in CONTEXTS},
                "bytes": sizes,
                "memory_bytes": needed,
                "most_bpw": most,
                "conversion": [
                    {
                        "rows": rows,
                        "length": length,
                        "disk_bytes": states_bytes(architecture, rows * length),
                        "memory_bytes": peak_bytes(architecture, rows * length),
                    }
                    for rows, length in TOKENS
                ],
            }
        )
        return 0
    print(f"{decoder_weights(architecture) / 1e9:.1f} billion weights in the decoder's linears, ", end="")
    print(f"{low:.3f} to {high:.3f} bits per weight; cache ", end="")
    print(", ".join(f"{cache_bytes(architecture, c) / 1e9:.2f} GB for {c} tokens" for c in CONTEXTS), "\n")
    print("| bits per weight | checkpoint | memory to run, 4k tokens | 8k tokens | fits into |")
    print("|---|---|---|---|---|")
    for bpw in BPWS:
        smallest = next((f"{gib} GiB" for gib in MEMORIES if gib * GIB >= needed[bpw][-1]), "more")
        cells = " | ".join(f"{count / 1e9:.1f} GB" for count in needed[bpw])
        print(f"| {bpw} | {sizes[bpw] / 1e9:.1f} GB | {cells} | {smallest} |")
    print("\n| memory | most bits per weight, 4k tokens | 8k tokens |\n|---|---|---|")
    for gib, values in most.items():
        print(f"| {gib} GiB | {' | '.join('-' if bpw is None else f'{bpw:.2f}' for bpw in values)} |")
    print("\n| calibration | tokens | states on disk | memory |\n|---|---|---|---|")
    for rows, length in TOKENS:
        tokens = rows * length
        disk, memory = states_bytes(architecture, tokens) / 1e9, peak_bytes(architecture, tokens) / 1e9
        print(f"| `--rows {rows} --length {length}` | {tokens:,} | {disk:.0f} GB | {memory:.1f} GB |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
