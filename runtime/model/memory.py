"""Models larger than the memory: which linears stay in it, and how fast a token is then.

Every linear has a use: the part of all tokens that read it, 1 but for experts. Those of the highest use are
copied from the repacked file into ordinary memory of the process: locking pages of the file takes privileges,
since most systems allow 8 MB. The rest stays mapped, comes from the disk when it is used and is kept by the
system as long as it has room.
"""

import mmap
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import Contents
from dbrx_quant.runtime.folder.expert_use import expert_use
from dbrx_quant.runtime.folder.repacked_file import (
    REPACKED_NAME,
    Place,
    RepackedFile,
    open_repacked,
    plan_repacked,
    write_repacked,
)
from dbrx_quant.runtime.kernels.activations import activations
from dbrx_quant.runtime.kernels.bodies import Body
from dbrx_quant.runtime.library import _native
from dbrx_quant.runtime.model.read_rates import disk_rate, drop_pages, memory_rate

Notify = Callable[[str], None]  # called with a line on what is done

_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """What stays in memory, and what a token then reads on average.

    Attributes:
        total: bytes of all weights.
        kept: bytes of those that stay.
        names: linears that stay.
        from_memory: bytes of a token's linears that stay.
        from_disk: bytes of its other linears.
    """

    total: int
    kept: int
    names: frozenset[str]
    from_memory: float
    from_disk: float

    @property
    def complete(self) -> bool:
        """Whether all weights stay."""
        return self.kept == self.total


def plan_memory(
    places: Sequence[Place], use: Mapping[int, Sequence[float]], fixed: int, limit: int
) -> MemoryPlan:
    """The linears that stay: those of the highest use that there is room for, earlier blocks first.

    Args:
        places: all repacked linears.
        use: block → the chance of each of its experts to be chosen for a token.
        fixed: bytes of what stays in any case: 16-bit tensors, and heads of linears.
        limit: bytes of all that stays.

    Raises:
        ValueError: the limit is below what stays in any case.
    """
    if fixed > limit:
        raise ValueError(
            f"memory: {_gb(limit)} are too little: embedding, norms, routers and tables of this model take "
            f"{_gb(fixed)}, besides linears, the cache and the program itself"
        )
    chances = [1.0 if p.spec.expert is None else use[p.spec.block or 0][p.spec.expert] for p in places]
    kept, names = fixed, set[str]()
    for index in sorted(range(len(places)), key=lambda index: -chances[index]):
        if kept + places[index].body_bytes <= limit:
            kept += places[index].body_bytes
            names.add(places[index].spec.name)
    pairs = list(zip(places, chances, strict=True))
    return MemoryPlan(
        fixed + sum(p.body_bytes for p in places),
        kept,
        frozenset(names),
        sum(p.body_bytes * chance for p, chance in pairs if p.spec.name in names),
        sum(p.body_bytes * chance for p, chance in pairs if p.spec.name not in names),
    )


@dataclass(frozen=True)
class Memory:
    """The memory that a model may keep weights in.

    Attributes:
        limit: bytes.
        plan: what stays.
        file: the repacked file; None where all weights stay and there is none.
        places: of the linears that are planned for.
        measured: whether a measurement told which experts are busy.
        notify: called with each line for the user.
    """

    limit: int
    plan: MemoryPlan
    file: RepackedFile | None
    places: Sequence[Place]
    measured: bool
    notify: Notify

    def bodies(self) -> dict[str, Body]:
        """Linear → its body: of those that stay a copy in memory, of the others a part of the mapped file.

        Says what is done and how fast a token is going to be.
        """
        if self.file is None:
            self.notify(f"all {_gb(self.plan.total)} of weights stay in memory")
            return {}
        kept, seconds = _copies(self.file, self.plan.names)
        if not self.plan.complete:
            rest = [place for place in self.places if place.spec.name not in self.plan.names]
            self.notify(self._summary(disk_rate(self.file, rest), memory_rate()))
        else:
            self.notify(
                f"all {_gb(self.plan.total)} of weights stay in memory, read in {seconds:.1f} seconds"
            )
        return self.file.mapped_bodies() | kept

    def _summary(self, disk: float, memory: float) -> str:
        """What stays and how fast a token is, at these bytes a second."""
        plan = self.plan
        busy = "the busiest experts" if self.measured else "without a measurement.json any experts"
        rate = 1 / (plan.from_disk / disk + plan.from_memory / memory)
        pace = f"{rate:.2g}" if rate < 10 else f"{rate:.0f}"
        return (
            f"{_gb(plan.kept)} of {_gb(plan.total)} stay in memory ({busy}); a token reads about "
            f"{_gb(plan.from_disk)} from disk on average: about {pace} tokens a second at "
            f"{_gb(disk)}/s, more where the system has room to keep what was read"
        )


def prepare_memory(
    contents: Contents,
    limit: int,
    item_bytes: int,
    notify: Notify,
    host: Collection[str] | None = None,
) -> Memory:
    """Decide what stays in memory, and make the repacked file where it is needed and not there.

    Args:
        contents: the folder's.
        limit: bytes of weights in memory.
        item_bytes: of an element of the tensors that are not quantized, as they are loaded.
        notify: called with each line for the user.
        host: the linears and tensors that a GPU does not hold; None: there is no GPU.

    Raises:
        ValueError: the limit is too small, or activations are `float`, whose kernels read the shards.
        RuntimeError: there is no native library.
        OSError: the repacked file cannot be written.
    """
    if activations() == "float":
        raise ValueError(
            "memory: activations are 'float', for which the shards themselves are read; leave it out"
        )
    if (reason := _native.why_unavailable()) is not None:
        raise RuntimeError(f"memory: needs the native kernels: {reason}")
    folder = contents.checkpoint.folder
    use, measured = expert_use(folder, contents.architecture)
    places = [place for place in plan_repacked(contents) if host is None or place.spec.name in host]
    floats = [name for name in contents.names if name.rpartition(".")[0] not in contents.groups]
    floats = [name for name in floats if host is None or name in host]
    elements = sum(int(np.prod(contents.checkpoint.info(name).shape)) for name in floats)
    fixed = elements * item_bytes + sum(place.head_bytes for place in places)
    plan = plan_memory(places, use, fixed, limit)
    try:
        file = open_repacked(contents)
    except CheckpointError as error:
        notify(str(error))
        file = None
    if file is None and not plan.complete:
        size = _gb(sum(place.body_bytes for place in places))
        notify(f"{folder / REPACKED_NAME}: writing {size}, once; `dbrx-quant repack` does it ahead")
        file = _write(contents)
    return Memory(limit, plan, file, places, measured, notify)


def _write(contents: Contents) -> RepackedFile:
    try:
        return write_repacked(contents)
    except OSError as error:
        text = f"{error.strerror or error}; with memory for all of the weights this file is not needed"
        raise OSError(error.errno, text, str(error.filename)) from error


def _copies(file: RepackedFile, names: frozenset[str]) -> tuple[dict[str, Body], float]:
    """Linear → a copy of its body in memory; and the seconds that reading took.

    The system need not keep the file's pages for them, too.
    """
    started = time.monotonic()
    places = [place for place in file.places if place.spec.name in names]
    starts = np.cumsum([0, *(-(-place.body_bytes // 64) * 64 for place in places)])
    if not places:
        return {}, 0.0
    try:
        memory = mmap.mmap(-1, int(starts[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{_gb(int(starts[-1]))} of weights in memory: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, dtype=np.uint8)
    made: dict[str, Body] = {}
    with file.path.open("rb", buffering=0) as stream:
        for place, start in zip(places, starts.tolist(), strict=False):
            _read_into(stream.fileno(), place.start, data[start : start + place.body_bytes], file)
            drop_pages(stream.fileno(), place)
            body = file.body(place, data, data.ctypes.data + start, False)
            if body is not None:
                made[place.spec.name] = body
    return made, time.monotonic() - started


def _read_into(descriptor: int, at: int, into: np.ndarray[Any, Any], file: RepackedFile) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + _READ_BYTES].data], at + done)
        if count == 0:
            raise CheckpointError(
                f"{file.path}: was cut while it was read; make it anew with `dbrx-quant repack`"
            )
        done += count


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
