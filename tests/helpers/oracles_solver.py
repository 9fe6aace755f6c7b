"""Oracles and test matrices of the solver tests: independent of quantize/, slow and obvious."""

import numpy as np
import torch

from dbrx_quant.runtime.library import _native


def on_every_instruction_set(function):
    """Yields the result of calling `function` on each instruction set that this CPU has."""
    for isa in ("scalar", "avx2", "avx512"):
        try:
            with _native.forced_isa(isa):
                yield function()
        except RuntimeError as error:
            if "instruction set" not in str(error):
                raise


def half(x):
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def stored_scales(scale_max, scale_codes):
    """Scales [N] as the format text has them, one rounding a step."""
    multiplier = half(np.float64(scale_max) / 256)
    s = np.asarray(scale_codes, np.float64) + 1
    return half(s * s * multiplier)


def nearest(x, scale, bits):
    """Grid values nearest to x [rows, N] for scales [N], not rounded to half."""
    half_range = 2 ** (bits - 1)
    safe = np.where(scale > 0, scale, 1)
    return np.clip(np.rint(x / safe), -half_range, half_range - 1) * scale


def weighted_error(x, scale, bits, row_weights):
    """[N] weighted squared rounding errors of x [rows, N], in float64."""
    return (row_weights[:, None] * (x - nearest(x, scale, bits)) ** 2).sum(0)


def exl2_search(x, bits):
    """exllamav2's rule: (scale_max, scale_codes [N]); one clip factor for all columns, |error|^3.5."""
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    base = (np.abs(x).max(0) + 1e-12) / (top / 2)
    maximum = base.max()
    s = np.clip(np.rint(16 * np.sqrt(base / maximum)), 1, 16)
    scale = (s / 16) ** 2 * maximum
    best = None
    for i in range(97):
        p = 0.70 * (1 - i / 96) + 1.20 * (i / 96)
        rounded = np.clip(np.rint(x / (p * scale)), -zero, top - zero) * (p * scale)
        error = (np.abs(rounded - x) ** 3.5).sum()
        if best is None or error < best[0]:
            best = error, p
    return float(half(maximum * best[1])), (s - 1).astype(np.uint8)


def exhaustive_search(x, bits, row_weights, column_weights, maxima=200):
    """The least error over all sixteen scales of every column and many maxima."""
    half_range = 2 ** (bits - 1)
    top = max((x.max(0) / (half_range - 0.5)).max(), (-x.min(0) / (half_range + 0.5)).max())
    best = np.inf
    for maximum in half(np.geomspace(0.2 * top, 1.2 * top, maxima)):
        errors = [weighted_error(x, stored_scales(maximum, code), bits, row_weights) for code in range(16)]
        best = min(best, (np.min(errors, 0) * column_weights).sum())
    return best


def ldlq(weight, upper, pivots, groups, search):
    """Dequantized [K, N], in float64, by any rule for the scales: `search(targets, bits, pivots)` -> [N]."""
    errors = np.zeros_like(weight)
    values = np.zeros_like(weight)
    start = 0
    for group in groups:
        end = start + group.rows
        targets = weight[start:end] + upper[:start, start:end].T @ errors[:start]
        scale = search(targets, group.bits, pivots[start:end])
        for r in range(start, end):
            target = weight[r] + upper[:r, r] @ errors[:r]
            values[r] = half(nearest(target[None], scale, group.bits)[0])
            errors[r] = weight[r] - values[r]
        start = end
    return values


def strong_hessian(k, tokens, generator, decay=0.9, noise=0.15, spread=0.8):
    """Covariance, in act-order, of activations whose spectrum falls with the power `decay`.

    `noise` is added to every channel, and the logarithms of the channels' sizes have the deviation `spread`.
    """
    sizes = torch.exp(spread * torch.randn(k, generator=generator))
    basis = torch.linalg.qr(torch.randn(k, k, generator=generator)).Q
    spectrum = torch.arange(1.0, k + 1) ** -decay
    spectrum *= k / spectrum.sum()
    x = torch.randn(tokens, k, generator=generator) @ (basis * spectrum.sqrt()).T
    x = (x + noise * torch.randn(tokens, k, generator=generator)) * sizes
    hessian = x.T @ x / tokens
    order = hessian.diagonal().argsort(descending=True)
    return hessian[order][:, order].contiguous()


def damped(hessian, fraction):
    return hessian + fraction * hessian.diagonal().mean() * torch.eye(len(hessian))


def weights(k, n, generator):
    """Weights with the heavier tails and the spread of columns of trained ones."""
    normal = torch.randn(k, n, generator=generator)
    tails = (torch.randn(8, k, n, generator=generator) ** 2).mean(0).sqrt()  # normal / tails: Student's t
    return 0.02 * normal / tails * torch.exp(0.15 * torch.randn(n, generator=generator))
