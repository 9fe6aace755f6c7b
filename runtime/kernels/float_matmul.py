"""Faster matrix products on CPUs: exact ones where torch's default library is slow, and rounded ones.

torch multiplies float32 matrices through MKL, which on AMD CPUs reaches less than half of what oneDNN does
(216 against 506 GFLOPS on two Zen 5 cores). torch takes oneDNN only where the product may be rounded to
bfloat16; whether oneDNN then really rounds depends on the CPU and is found out by a trial.

Statistics of a text need no exact products: where the CPU multiplies bfloat16 itself, activations are rounded
to it, sums stay float32. On two cores with AMX the products of an expert, 2,048 tokens at DBRX's shapes, take
331 GFLOPS exactly, 908 with float32 tensors that oneDNN rounds, 2,183 with bfloat16 tensors.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EXACT = 1e-5  # relative error that float32 stays far below, and bfloat16 far above

_ASKED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rounded_dtype() -> torch.dtype:
    """What activations are rounded to where products need not be exact: bfloat16, if the CPU multiplies it.

    Else float32, which is no rounding. `DBRXQ_PRODUCTS` (float32 or bfloat16) overrides it.

    Raises:
        ValueError: another value of that.
    """
    asked = os.environ.get("DBRXQ_PRODUCTS")
    if not asked:
        return torch.bfloat16 if _multiplies_bfloat16() else torch.float32
    if asked not in _ASKED:
        raise ValueError(f"DBRXQ_PRODUCTS is {asked!r}; expected {' or '.join(_ASKED)}")
    return _ASKED[asked]


@functools.cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def narrowed(weight: Tensor) -> Tensor:
    """A weight for `product`: in `rounded_dtype`, which is what most originals are stored in."""
    return weight.to(rounded_dtype())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T, [T, N] float32, of x [T, K] float32 and W [N, K], computed in the type of W."""
    return (x.to(weight.dtype) @ weight.T).float()


@contextmanager
def rounded_products() -> Iterator[None]:
    """Inside the `with` block float32 products round what they multiply to `rounded_dtype`.

    The setting is torch's own and holds for the whole process.
    """
    if rounded_dtype() == torch.float32:
        yield
    else:
        with _may_round():
            yield


@contextmanager
def fast_products() -> Iterator[bool]:
    """Inside the `with` block float32 products go through oneDNN if they stay float32 there; yields whether.

    The setting is torch's own and holds for the whole process. From here on MKL keeps to torch's number of
    threads, too: left to choose (MKL_DYNAMIC) it may take fewer, and that can mean other last bits.
    """
    torch.set_num_threads(torch.get_num_threads())
    with _may_round():
        exact = _error() < EXACT
        if exact:
            yield True
            return
    yield False


@contextmanager
def _may_round() -> Iterator[None]:
    """Inside the `with` block torch multiplies float32 by oneDNN, which may round to bfloat16."""
    settings: Any = vars(torch.backends)["mkldnn"].matmul  # not in torch's type stubs
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        yield
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
