"""Instructions that turn registers into a register: each a function of arrays, one element a thread.

Registers are arrays of unsigned integers, predicates of booleans; a function views them as the instruction's type
says and gives a register back. What PTX leaves to the hardware (`.approx`) is computed to the last bit here.
"""

import numpy as np
from ptx_halves import float_fused, half_bits, half_fused, half_product, half_sum, halves
from ptx_text import SIZES

UNSIGNED = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
ROUNDINGS = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "approx", "full", "ftz", "sat"}


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


def _flushed(values):
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _saturated(values):
    return np.clip(np.nan_to_num(values, nan=0.0), 0, 1).astype(values.dtype)


def _pick(first, second, smaller):
    """PTX's min and max of floats: a NaN yields to a number."""
    picked = np.fmin(first, second) if smaller else np.fmax(first, second)
    return picked


def _quotient(a, b):
    """Integer division towards zero; of what divides by zero, PTX says nothing."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    whole = a // safe
    if a.dtype.kind == "i":
        whole += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return whole


def _remainder(a, b):
    return a - _quotient(a, b) * b


FLOAT_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": lambda a, b: _pick(a, b, True),
    "max": lambda a, b: _pick(a, b, False),
    "copysign": lambda a, b: np.copysign(b, a),  # the sign of a
}
FLOAT_UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "ex2": lambda a: np.exp2(a.astype(np.float64)),
    "lg2": lambda a: np.log2(a.astype(np.float64)),
    "sin": lambda a: np.sin(a.astype(np.float64)),
    "cos": lambda a: np.cos(a.astype(np.float64)),
    "tanh": lambda a: np.tanh(a.astype(np.float64)),
}
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
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}

LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


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


def _compare(parts, kind):
    """setp without a second predicate: comparisons of integers, and of floats ordered or not."""
    comparison, floating = parts[1], kind[0] in "fb" and kind not in ("b16", "b32", "b64")

    def compare(a, b):
        a, b = typed(a, kind), typed(b, kind)
        if not floating:
            return COMPARISONS[comparison](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if comparison in ("nan", "num"):
            return unordered == (comparison == "nan")
        if comparison[-1] == "u" and comparison != "u":
            return COMPARISONS[comparison[:-1]](a, b) | unordered
        return COMPARISONS[comparison](a, b) & ~unordered

    if comparison.rstrip("u") not in COMPARISONS and comparison not in ("nan", "num"):
        return None
    return compare


def _logic(table):
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
            bits = np.where((count > 0) & (bits >> np.maximum(count - 1, 0) & 1 != 0), bits - (1 << count), bits)
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


def _convert(parts):
    """cvt: target type, source type; integers wrap, floats to integers saturate."""
    to, of = parts[-2], parts[-1]
    if to in ("f16x2", "bf16x2"):
        half = to[:-2]

        def pack(a, b):
            high, low = register(typed(a, of), half), register(typed(b, of), half)
            return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

        return pack
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounders = [rounding[part] for part in parts if part in rounding]

    def convert(a):
        values = typed(a, of)
        if of[0] not in "us" and to[0] in "us":
            limits = np.iinfo(UNSIGNED[SIZES[to]] if to[0] == "u" else SIGNED[SIZES[to]])
            whole = np.nan_to_num(rounders[0](values.astype(np.float64)), nan=0.0)
            inside = np.clip(whole, float(limits.min), float(limits.max))
            return np.where(whole >= float(limits.max), limits.max, inside.astype(limits.dtype)).view(UNSIGNED[SIZES[to]])
        if to[0] in "us":
            size = SIZES[to]
            if "sat" in parts:
                limits = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[size])
                values = np.clip(values, limits.min, limits.max)
            return values.astype((SIGNED if to[0] == "s" else UNSIGNED)[size]).view(UNSIGNED[size])
        for rounder in rounders:
            values = rounder(values)
        if "sat" in parts:
            values = _saturated(values)
        if "relu" in parts:
            values = np.maximum(values, 0)
        exact = values.astype(np.float64) if of in ("u64", "s64") else values
        return register(exact, to)

    return convert


def _whole_floats(parts, kind):
    """Arithmetic of f16, bf16, f32 and f64 with one or two sources, and fma."""
    name = parts[0]
    operation = FLOAT_UNARY.get(name) or FLOAT_BINARY.get(name)
    if name in ("fma", "mad"):
        if kind == "f32":
            return lambda a, b, c: register(float_fused(*(typed(v, kind) for v in (a, b, c)), "rm" in parts), kind)
        if kind == "f16":
            return half_fused
        return None
    if operation is None:
        return None

    def compute(*sources):
        values = [typed(source, kind) for source in sources]
        if "ftz" in parts:
            values = [_flushed(value) for value in values]
        result = operation(*values)
        if kind == "f32":
            result = result.astype(np.float32, copy=False)
        if "ftz" in parts:
            result = _flushed(result)
        return register(_saturated(result) if "sat" in parts else result, kind)

    return compute


_PAIRS = {"add": half_sum, "mul": half_product, "fma": half_fused}


def _pairs(parts, kind):
    """f16x2: each half by itself, rounded once, subnormals kept."""
    name = parts[0]
    if kind == "bf16x2" or not {*parts[1:-1]} <= {"rn"}:
        return None
    if name in _PAIRS:
        return _PAIRS[name]
    if name == "sub":
        return lambda a, b: half_sum(a, b ^ np.uint32(0x80008000))
    if name == "neg":
        return lambda a: a ^ np.uint32(0x80008000)
    if name == "abs":
        return lambda a: a & np.uint32(0x7FFF7FFF)
    if name in ("min", "max"):
        return lambda a, b: half_bits(_pick(halves(a), halves(b), name == "min"), np.uint32)
    return None


def _integers(parts, kind):
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


def function_of(instruction):
    """The function of an instruction's sources, or None where it is not one that only computes.

    Sources are registers and, of lop3, no table: it is part of the function.
    """
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    if name == "cvt":
        return _convert(parts)
    if name == "lop3" and instruction.opcode == "lop3.b32":
        return _logic(instruction.operands[4].bits)
    if name == "setp" and len(parts) == 3:
        return _compare(parts, kind)
    if name == "setp" and len(parts) == 4 and parts[2] in LOGICAL:
        compare, join = _compare(parts, kind), LOGICAL[parts[2]]
        return lambda a, b, c: join(compare(a, b), c)
    if name == "selp":
        return lambda a, b, p: np.where(p, a, b)
    if kind == "pred":
        return {**LOGICAL, "not": np.logical_not, "mov": lambda a: a}.get(name)
    if kind not in SIZES:
        return None
    if name == "mov":
        return lambda a: a
    if kind in ("f16x2", "bf16x2"):
        return _pairs(parts, kind)
    if kind in ("f16", "bf16", "f32", "f64"):
        return _whole_floats(parts, kind) if set(parts[1:-1]) <= ROUNDINGS else None
    return _integers(parts, kind)


def source_sizes(instruction):
    """Bytes of each source, for constants."""
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    size = SIZES.get(kind, 4)
    count = len(instruction.operands) - 1
    if name == "lop3":
        return [4, 4, 4]
    if name in ("shl", "shr"):
        return [size, 4]
    if name == "selp":
        return [size, size, 0]
    if name == "mad" and parts[1] == "wide":
        return [size, size, 2 * size]
    if name == "setp" and count == 3:
        return [size, size, 0]
    if name in ("bfi", "bfe"):
        return [size] * (count - 2) + [4, 4]
    return [size] * count


