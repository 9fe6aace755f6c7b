"""Whether native steps on a GPU keep keys and values in 16 bits or as bytes: one setting for the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

CACHE_VARIABLE = "DBRXQ_CACHE_BITS"

_cache_bits: int | None = None


def cache_bits() -> int:
    """Bits of a key's or value's number in the caches of steps on a GPU.

    16, unless DBRXQ_CACHE_BITS or `use_cache_bits` say 8.

    Raises:
        ValueError: the environment variable is neither 8 nor 16.
    """
    global _cache_bits
    if _cache_bits is None:
        value = os.environ.get(CACHE_VARIABLE) or "16"
        if value not in ("8", "16"):
            raise ValueError(f"{CACHE_VARIABLE}: {value!r}, expected 8 or 16")
        _cache_bits = int(value)
    return _cache_bits


@contextmanager
def use_cache_bits(bits: int) -> Iterator[None]:
    """Have steps on a GPU keep keys and values in 8 bits, or in 16, inside the block, in all threads.

    Raises:
        ValueError: it is another number.
    """
    global _cache_bits
    if bits not in (8, 16):
        raise ValueError(f"cache bits: {bits}, expected 8 or 16")
    before = cache_bits()
    _cache_bits = bits
    try:
        yield
    finally:
        _cache_bits = before
