"""Remembering what was made of tensors, for as long as they live and are not modified."""

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

_version = attrgetter("_version")


def version_sum(tensors: Sequence[Tensor]) -> int:
    """The sum of the tensors' version counters, which grows when one of them is modified in place."""
    try:
        return sum(map(_version, tensors))
    except RuntimeError:  # tensors made in inference mode count no versions
        return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def remember(cache: dict[Any, Any], key: Any, tensors: Sequence[Tensor], made: Any) -> None:
    """Cache `made` under a key of the tensors' ids; the entry goes away when one of them is freed.

    For that, `made` must not hold the tensors themselves.
    """
    if key not in cache:
        for tensor in tensors:
            weakref.finalize(tensor, cache.pop, key, None).atexit = False
    cache[key] = made
