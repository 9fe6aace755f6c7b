"""Instructions that turn registers into a register: each a function of arrays, one element a thread.

Registers are arrays of unsigned integers, predicates of booleans; a function views them as the
instruction's type says and gives a register back. What PTX leaves to the hardware (`.approx`) is computed
to the last bit here.
"""

import numpy as np
from ptx_halves import float_fused, half_bits, half_fused, half_product, half_sum, halves
from ptx_integers import integer_function, logic_function
from ptx_text import SIZES
from ptx_types import SIGNED, UNSIGNED, register, typed

ROUNDINGS = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "approx", "full", "ftz", "sat"}


def _flushed(values):
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _saturated(values):
    return np.clip(np.nan_to_num(values, nan=0.0), 0, 1).astype(values.dtype)


def _pick(first, second, smaller):
    """PTX's min and max of floats: a NaN yields to a number."""
    picked = np.fmin(first, second) if smaller else np.fmax(first, second)
    return picked


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
            return np.where(whole >= float(limits.max), limits.max, inside.astype(limits.dtype)).view(
                UNSIGNED[SIZES[to]]
            )
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
            return lambda a, b, c: register(
                float_fused(*(typed(v, kind) for v in (a, b, c)), "rm" in parts), kind
            )
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


def function_of(instruction):
    """The function of an instruction's sources, or None where it is not one that only computes.

    Sources are registers and, of lop3, no table: it is part of the function.
    """
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    if name == "cvt":
        return _convert(parts)
    if name == "lop3" and instruction.opcode == "lop3.b32":
        return logic_function(instruction.operands[4].bits)
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
    return integer_function(parts, kind)


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
