"""Faster matrix products: exact ones where torch's default library for CPUs is slow, and rounded ones.

torch multiplies float32 matrices through MKL, which on AMD CPUs reaches less than half of what oneDNN does
(216 against 506 GFLOPS on two Zen 5 cores). torch takes oneDNN only where the product may be rounded to
bfloat16; whether oneDNN then really rounds depends on the CPU and is found out by a trial.

Statistics of a text need no exact products: where bfloat16 is the faster product, activations are rounded to
it, sums stay float32. On two cores with AMX the products of an expert, 2,048 tokens at DBRX's
shapes, take 331 GFLOPS exactly, 908 with float32 tensors that oneDNN rounds, 2,183 with bfloat16 tensors.
GPUs round float32 tensors to TF32, which keeps three bits more than bfloat16.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.kernels.device import CPU, EXACT

_ROUNDS_TO = {"cpu": ("mkldnn", "bf16"), "cuda": ("cuda", "tf32")}  # torch's setting for float32 tensors
_ASKED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rounded_dtype(device: torch.device = CPU) -> torch.dtype:
    """What activations are rounded to where products need not be exact: bfloat16 if it is the faster one.

    Else float32, which is no rounding. `DBRXQ_PRODUCTS` (float32 or bfloat16) overrides it.

    Raises:
        ValueError: another value of that.
    """
    asked = os.environ.get("DBRXQ_PRODUCTS")
    if not asked:
        return torch.bfloat16 if _bfloat16_pays(device) else torch.float32
    if asked not in _ASKED:
        raise ValueError(f"DBRXQ_PRODUCTS is {asked!r}; expected {' or '.join(_ASKED)}")
    return _ASKED[asked]


@functools.cache
def _bfloat16_pays(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32. A rule: a trial would depend on the load.

    AMX does, and AVX-512's own instruction on AMD's CPUs. Intel's have that at half the rate: 145 GFLOPS on
    two cores of a Sapphire Rapids without AMX, where float32 has 245.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    tell = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch have none
    capabilities: dict[str, Any] = tell()
    return torch.cpu._is_amx_tile_supported() or (
        torch.cpu._is_avx512_bf16_supported() and capabilities.get("cpu_name", "").startswith("AMD")
    )


def narrowed(weight: Tensor) -> Tensor:
    """A weight for `product`: in `rounded_dtype`, which is what most originals are stored in."""
    return weight.to(rounded_dtype(weight.device))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T, [T, N] float32, of x [T, K] float32 and W [N, K], computed in the type of W."""
    return (x.to(weight.dtype) @ weight.T).float()


@contextmanager
def rounded_products(device: torch.device = CPU) -> Iterator[None]:
    """Inside the `with` block float32 products may round what they multiply, where `rounded_dtype` does.

    The setting is torch's own and holds for the whole process.
    """
    if rounded_dtype(device) == torch.float32 or device.type not in _ROUNDS_TO:
        yield
    else:
        with _precision(*_ROUNDS_TO[device.type]):
            yield


@contextmanager
def fast_products() -> Iterator[bool]:
    """Inside the `with` block float32 products go through oneDNN if they stay float32 there; yields whether.

    The setting is torch's own and holds for the whole process. From here on MKL keeps to torch's number of
    threads, too: left to choose (MKL_DYNAMIC) it may take fewer, and that can mean other last bits.
    """
    torch.set_num_threads(torch.get_num_threads())
    with _precision(*_ROUNDS_TO["cpu"]):
        exact = _error() < EXACT
        if exact:
            yield True
            return
    yield False


@contextmanager
def exact_on_gpus() -> Iterator[None]:
    """Inside the `with` block GPUs multiply float32 as float32, and sum up products of bfloat16 in it.

    The settings are torch's own and hold for the whole process.
    """
    settings: Any = vars(torch.backends)["cuda"].matmul
    before = settings.allow_bf16_reduced_precision_reduction
    try:
        settings.allow_bf16_reduced_precision_reduction = False
        with _precision("cuda", "ieee"):
            yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


@contextmanager
def _precision(backend: str, kind: str) -> Iterator[None]:
    """Inside the `with` block float32 products of a backend are of a kind: `ieee`, or what they may round to.

    On CPUs anything but `ieee` also has oneDNN multiply, where it may.
    """
    settings: Any = vars(torch.backends)[backend].matmul  # not in torch's type stubs
    before = settings.fp32_precision
    try:
        settings.fp32_precision = kind
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
