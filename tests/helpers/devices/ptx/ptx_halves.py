"""Rounding: sums and products that are rounded once, whatever numpy and torch would do in between."""

import numpy as np
import torch


def halves(bits):
    """float32 of the halves in words of 16 bits [n], or of 32 bits: [2 n], low half first."""
    return _as_halves(bits).float().numpy()


def half_bits(values, words):
    """float32 values rounded to nearest even, as words of the type `words`."""
    return torch.from_numpy(np.ascontiguousarray(values)).half().numpy().view(words)


def _as_halves(bits):
    return torch.from_numpy(np.atleast_1d(bits).view(np.float16))


def to_odd(total, error):
    """float32 or float64 sums → rounded to odd, where `error` is what the sum has lost.

    A value that is rounded to odd first may be rounded again to two bits fewer or more: the second rounding
    is then that of the exact value.
    """
    lost = (error != 0) & np.isfinite(total)
    if not lost.any():
        return total
    bits = total.view(np.int32 if total.dtype == np.float32 else np.int64)
    even = lost & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # the exact value is larger in magnitude
    return np.where(even, bits + np.where(away, 1, -1).astype(bits.dtype), bits).view(total.dtype)


def sum_and_error(a, b):
    """a + b rounded, and exactly what the rounding lost (Knuth's TwoSum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def half_sum(a, b):
    """Words of halves a + b. torch adds in float32: bits enough to be rounded again, 24 >= 2 * 11 + 2."""
    return torch.add(_as_halves(a), _as_halves(b)).numpy().view(a.dtype)


def half_product(a, b):
    """Words of halves a * b. torch multiplies in float32, which holds every product exactly."""
    return torch.mul(_as_halves(a), _as_halves(b)).numpy().view(a.dtype)


def half_fused(a, b, c):
    """Words of halves a * b + c, rounded once."""
    total, error = sum_and_error(halves(a) * halves(b), halves(c))
    return half_bits(to_odd(total, error), a.dtype)


def float_fused(a, b, c, downwards=False):
    """float32 a * b + c, rounded once, to nearest even or downwards."""
    total, error = sum_and_error(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if not downwards:
        return to_odd(np.atleast_1d(total), error).astype(np.float32)
    near = total.astype(np.float32)
    above = (near > total) | ((near == total) & (error < 0))
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near)
