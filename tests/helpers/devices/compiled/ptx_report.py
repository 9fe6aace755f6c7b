"""What the kernels of products execute a weight, and how they fetch: run this file.

Two matrices of one width run, one with more units than the other: their difference is what a unit costs,
seldom taken branches at the rate that they are taken, without the beginning and the end of a kernel. One
group of scales has 128 rows, as in DBRX. Counted are PTX instructions: ptxas fuses and adds some. A lane's
share of a unit of 32 rows by 128 columns is 128 weights.
"""

import argparse
import sys
from pathlib import Path

for folder in (".", "..", "../ptx", "../..", "../../../.."):
    sys.path.insert(0, str(Path(__file__).resolve().parent / folder))

import torch  # noqa: E402
from emulated import linear  # noqa: E402
from ptx_build import build  # noqa: E402
from ptx_counts import Counts  # noqa: E402
from ptx_device import Device, short_name  # noqa: E402

import oracles_ops as oracle  # noqa: E402

WIDTHS = (8, 6, 5, 4, 3, 2)
KINDS = ("mma", "f16x2", "lop3", "ld.global", "ld.shared", "ld.generic", "cp", "bra")
SHORT, LONG = 2048, 4096  # input channels; both give every warp of a block its share


def difference(device, bits, tokens):
    """(the product's kernel, weights between the two lengths, its counts between them)."""
    found = []
    for k in (SHORT, LONG):
        tensors = oracle.random_tensors([(bits, 128)] * (k // 128), 128)
        with device.running(multiprocessors=1):
            linear(torch.zeros(tokens, k).half(), tensors)  # tiles the words
            device.machine.counts.clear()
            linear(torch.zeros(tokens, k).half(), tensors)
        kernel = next(name for name in device.machine.counts if "gem" in short_name(name))
        found.append(Counts(device.machine.counts[kernel]))
    more = Counts(found[1])
    more.subtract(found[0])
    return short_name(kernel), (LONG - SHORT) * 128, more


def main():
    """Prints a line for each kernel and width."""
    parser = argparse.ArgumentParser(
        description="Instructions of the products' kernels a weight, from their PTX."
    )
    parser.add_argument("--target", type=int, default=80, help="compute capability, such as 80")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64], help="rows of x")
    options = parser.parse_args()
    device = Device(build(options.target))
    print(f"sm_{options.target}: PTX instructions of a lane a weight, but for mov; moved against ideal")
    for tokens in options.tokens:
        for bits in WIDTHS:
            kernel, weights, counts = difference(device, bits, tokens)
            each = {kind: counts[f"instructions {kind}"] * 32 / weights for kind in KINDS}
            text = "  ".join(f"{kind} {value:.2f}" for kind, value in each.items() if value)
            ratios = [
                f"{what} {counts[what] / counts[f'{what}, ideal']:.2f}"
                for what in ("loaded sectors", "copied sectors", "shared wavefronts")
                if counts[f"{what}, ideal"]
            ]
            total = (counts["instructions"] - counts["instructions mov"]) * 32 / weights
            print(
                f"  {kernel:<18} {tokens:>3} tokens {bits} bits  {total:.2f}:  {text}   {', '.join(ratios)}"
            )


if __name__ == "__main__":
    main()
