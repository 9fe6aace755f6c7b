"""Faster float32 matrix products on CPUs where torch's default library is slow.

torch multiplies float32 matrices through MKL, which on AMD CPUs reaches less than half of what oneDNN does
(216 against 506 GFLOPS on two Zen 5 cores). torch takes oneDNN only where the product may be rounded to
bfloat16; whether oneDNN then really rounds depends on the CPU and is found out by a trial.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT = 1e-5  # relative error that float32 stays far below, and bfloat16 far above


@contextmanager
def fast_products() -> Iterator[bool]:
    """Inside the `with` block float32 products go through oneDNN if they stay float32 there; yields whether.

    The setting is torch's own and holds for the whole process. From here on MKL keeps to torch's number of
    threads, too: left to choose (MKL_DYNAMIC) it may take fewer, and that can mean other last bits.
    """
    torch.set_num_threads(torch.get_num_threads())
    settings: Any = vars(torch.backends)["mkldnn"].matmul  # not in torch's type stubs
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        exact = _error() < EXACT
        if not exact:
            settings.fp32_precision = before
        yield exact
    finally:
        settings.fp32_precision = before


def _error() -> float:
    """Relative error of products of several shapes, the largest."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for m, k, n in ((2048, 256, 192), (64, 512, 512), (1, 256, 512)):
        a = torch.randn(m, k, generator=generator)
        b = torch.randn(k, n, generator=generator)
        truth = a.double() @ b.double()
        worst = max(worst, float((a @ b - truth).norm() / truth.norm()))
    return worst
