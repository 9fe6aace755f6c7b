"""Arithmetic of integers and bits, as functions of registers."""

import numpy as np
from ptx_text import SIZES
from ptx_types import SIGNED, UNSIGNED, typed


def _quotient(a, b):
    """Integer division towards zero; of what divides by zero, PTX says nothing."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    whole = a // safe
    if a.dtype.kind == "i":
        whole += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return whole


def _remainder(a, b):
    return a - _quotient(a, b) * b


INTEGER_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _quotient,
    "rem": _remainder,
}


def _high(a, b, size):
    """The upper half of products of integers."""
    if size < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(8 * size)).astype(a.dtype)
    low, rest = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> rest, y & low, y >> rest
    middle = x1 * y0 + (x0 * y0 >> rest)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> rest) + (other >> rest)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _product(parts, kind):
    """Products of integers, `.lo`, `.hi` or `.wide`, with or without a sum."""
    size, mode = SIZES[kind], parts[1]

    def times(a, b):
        a, b = typed(a, kind), typed(b, kind)
        if mode == "wide":
            wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size]
            return (a.astype(wide) * b.astype(wide)).view(UNSIGNED[2 * size])
        return (_high(a, b, size) if mode == "hi" else a * b).view(UNSIGNED[size])

    return times if parts[0] == "mul" else lambda a, b, c: times(a, b) + c


def _shift(parts, kind):
    size = SIZES[kind]
    signed = kind[0] == "s" and parts[0] == "shr"

    def shift(a, by):
        values = typed(a, kind) if signed else a
        count = np.minimum(by, 8 * size - 1).astype(values.dtype)
        moved = values << count if parts[0] == "shl" else values >> count
        if signed:
            return moved.view(a.dtype)
        return np.where(by >= 8 * size, a.dtype.type(0), moved)

    return shift


def logic_function(table):
    """lop3: bit 4 a + 2 b + c of the table."""

    def logic(a, b, c):
        if table == 0xEA:
            return (a & b) | c
        result = a & np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return logic


def _permute(a, b, selector):
    """prmt.b32: four bytes, or copies of their signs, of eight."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (nibble & 7).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble & 8 != 0, np.where(byte & np.uint64(128) != 0, 255, 0), byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _insert(a, b, at, count):
    """bfi.b32: `count` bits of a into b at bit `at`."""
    wide = np.uint64
    mask = ((wide(1) << np.minimum(count, 32).astype(wide)) - wide(1)) << np.minimum(at, 32).astype(wide)
    return (a.astype(wide) << np.minimum(at, 32).astype(wide) & mask | b & ~mask).astype(np.uint32)


def _extract(kind):
    """bfe of 32 bits."""

    def extract(a, at, count):
        at, count = np.minimum(at & 255, 32).astype(np.int64), np.minimum(count & 255, 32).astype(np.int64)
        values = typed(a, kind).astype(np.int64) >> at
        bits = values & (1 << count) - 1
        if kind == "s32":
            bits = np.where(
                (count > 0) & (bits >> np.maximum(count - 1, 0) & 1 != 0), bits - (1 << count), bits
            )
        return bits.astype(np.uint32)

    return extract


def _funnel(parts):
    """shf.l and shf.r of 32 bits, .wrap or .clamp: from b:a."""

    def shift(a, b, by):
        count = (by & 31 if parts[2] == "wrap" else np.minimum(by, 32)).astype(np.uint64)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        if parts[1] == "r":
            return (both >> count).astype(np.uint32)
        return (both << count >> np.uint64(32)).astype(np.uint32)

    return shift


def integer_function(parts, kind):
    name, size = parts[0], SIZES[kind]
    if name in INTEGER_BINARY and set(parts[1:-1]) <= {"uni"}:
        operation = INTEGER_BINARY[name]
        return lambda a, b: operation(typed(a, kind), typed(b, kind)).view(UNSIGNED[size])
    if name in ("mul", "mad") and parts[1] in ("lo", "hi", "wide"):
        return _product(parts, kind)
    if name in ("shl", "shr"):
        return _shift(parts, kind)
    return {
        "not": lambda a: ~a,
        "neg": lambda a: -a,
        "abs": lambda a: np.abs(typed(a, kind)).view(UNSIGNED[size]),
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": lambda a: np.uint32(8 * size) - _bit_length(a),
        "brev": lambda a: _reversed(a, 8 * size),
        "cnot": lambda a: (a == 0).astype(UNSIGNED[size]),
        "bfi": _insert if kind == "b32" else None,
        "bfe": _extract(kind) if size == 4 else None,
        "prmt": _permute if len(parts) == 2 else None,
        "shf": _funnel(parts) if name == "shf" else None,
        "mov": lambda a: a,
    }.get(name)


def _bit_length(a):
    length = np.zeros(np.shape(a), np.uint32)
    for bit in range(8 * a.dtype.itemsize):
        length = np.where(a >> a.dtype.type(bit) & a.dtype.type(1) != 0, np.uint32(bit + 1), length)
    return length


def _reversed(a, bits):
    result = np.zeros_like(a)
    for bit in range(bits):
        result |= (a >> a.dtype.type(bit) & a.dtype.type(1)) << a.dtype.type(bits - 1 - bit)
    return result
