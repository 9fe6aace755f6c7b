"""Registers as numbers of a PTX type, and back."""

import numpy as np
from ptx_halves import half_bits, halves
from ptx_text import SIZES

UNSIGNED = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def typed(bits, kind):
    """A register as numbers of a PTX type; 16-bit floats become float32."""
    size = SIZES[kind]
    bits = bits.astype(UNSIGNED[size], copy=False)
    if kind[0] == "s":
        return bits.view(SIGNED[size])
    if kind == "f16":
        return halves(np.atleast_1d(bits))
    if kind == "bf16":
        return (np.atleast_1d(bits).astype(np.uint32) << 16).view(np.float32)
    if kind == "f32":
        return bits.view(np.float32)
    return bits.view(np.float64) if kind == "f64" else bits


def register(values, kind):
    """Numbers of a PTX type as a register; floats are rounded to nearest even."""
    if kind == "f16":
        return half_bits(values.astype(np.float32, copy=False), np.uint16)
    if kind == "bf16":
        return _bfloat16(values)
    if kind in ("f32", "f64"):
        values = values.astype(np.float32 if kind == "f32" else np.float64, copy=False)
    return values.view(UNSIGNED[values.dtype.itemsize])


def _bfloat16(values):
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
