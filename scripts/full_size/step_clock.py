"""A clock for the steps of a program that does not know of it: their functions are replaced while it runs.

A step's time is its own: that of the steps inside it is theirs. What belongs to no step is the rest.
Products of matrices are counted as they are dispatched, whoever asks for them.
"""

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Count = Callable[[Mapping[str, Any]], float]  # from a call's arguments by name, and its "result"
REST = "rest"


@dataclass(frozen=True)
class Step:
    """A function that is timed.

    Attributes:
        name: of the step; several functions may share one.
        place: where the function is, `module:function` or `module:Class.method`; it may be a generator, or
            give a context manager, whose body is not counted.
        operations: what it has to compute; None: the products of matrices that it computes.
        moved: bytes that it has to read and write.
        scope: steps inside it are counted apart from others of their name, under both names.
        once: it runs once for all experts of a block.
    """

    name: str
    place: str
    operations: Count | None = None
    moved: Count | None = None
    scope: bool = False
    once: bool = False


@dataclass
class Total:
    """What the calls of a step add up to, each as often as it stands for.

    Attributes:
        calls: number of calls.
        seconds: their time.
        processor: seconds of all threads, which other programs on the machine hardly change.
        operations: what they had to compute.
        moved: bytes that they had to read and write.
    """

    calls: float = 0.0
    seconds: float = 0.0
    processor: float = 0.0
    operations: float = 0.0
    moved: float = 0.0


@dataclass
class _Frame:
    step: Step | None
    scope: str
    total: Total
    weight: float


class Clock:
    """Adds up the steps of the phases of a program.

    Attributes:
        phases: phase → step → total.
        spent: phase → seconds that really went by.
    """

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, Total]] = {}
        self.spent: dict[str, float] = {}
        self._frames: list[_Frame] = []
        self._weight = 1.0
        self._mark = 0.0, 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs in the `with` block; outside of such blocks nothing is."""
        totals: dict[str, Total] = self.phases.setdefault(name, {})
        begun, _ = self._mark = _now()
        self._frames = [_Frame(None, "", totals.setdefault(REST, Total()), 1.0)]
        try:
            yield
        finally:
            self._charge()
            self._frames = []
            self.spent[name] = self.spent.get(name, 0.0) + _now()[0] - begun

    def stand_for(self, weight: float) -> None:
        """From now on everything counts so many times."""
        self._charge()
        self._weight = weight

    def enter(self, step: Step) -> None:
        """A step begins."""
        if not self._frames:
            return
        self._charge()
        outer = self._frames[-1]
        totals = self.phases[next(reversed(self.phases))]
        total = totals.setdefault(f"{outer.scope}{step.name}", Total())
        self._frames.append(
            _Frame(step, f"{step.name}: " if step.scope else outer.scope, total, self._weight)
        )
        if step.once:
            self._weight = 1.0
        total.calls += self._weight

    def leave(self, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """The step that began last ends; `arguments` gives those of its call, for its counts."""
        if not self._frames:
            return
        self._charge()
        frame = self._frames.pop()
        assert frame.step is not None
        if frame.step.operations:
            frame.total.operations += self._weight * frame.step.operations(arguments())
        if frame.step.moved:
            frame.total.moved += self._weight * frame.step.moved(arguments())
        self._weight = frame.weight
        self._mark = _now()  # counting is nobody's time

    def product(self, operations: float) -> None:
        """Products of matrices were computed."""
        if self._frames:
            frame = self._frames[-1]
            if frame.step is None or frame.step.operations is None:
                frame.total.operations += self._weight * operations

    def _charge(self) -> None:
        before, self._mark = self._mark, _now()
        if self._frames:
            total = self._frames[-1].total
            total.seconds += self._weight * (self._mark[0] - before[0])
            total.processor += self._weight * (self._mark[1] - before[1])


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@contextmanager
def timed(clock: Clock, steps: Sequence[Step]) -> Iterator[None]:
    """Inside the `with` block the steps' functions and all products of matrices tell the clock.

    Raises:
        ValueError: there is no such function; the program has changed.
    """
    with ExitStack() as stack:
        for step in steps:
            stack.enter_context(replaced(step.place, partial(_told, clock, step)))
        stack.enter_context(_Products(clock))
        yield


@contextmanager
def replaced(place: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the `with` block `change` of a function is in its place, in all modules that know it.

    Args:
        place: `module:function` or `module:Class.method`.
        change: from the function to what takes its place.

    Raises:
        ValueError: there is no such function.
    """
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *owners, name = path.split(".")
    try:
        for part in owners:
            owner = getattr(owner, part)
        function = vars(owner)[name]
    except (AttributeError, KeyError):
        raise ValueError(f"{place}: there is no such function; it has another name or place by now") from None
    package = __name__.partition(".")[0] + "."
    known = [known for name, known in sys.modules.items() if name.startswith(package)]
    places: list[tuple[Any, str]] = [(owner, name)]
    for where in [] if owners else known:
        places += [(where, key) for key, value in vars(where).items() if value is function]
    static = isinstance(function, staticmethod)
    changed = staticmethod(change(function.__func__)) if static else change(function)
    for where, key in places:
        setattr(where, key, changed)
    try:
        yield
    finally:
        for where, key in places:
            setattr(where, key, function)


def _told(clock: Clock, step: Step, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, telling the clock."""
    signature = inspect.signature(function)
    inner = getattr(function, "__wrapped__", None)

    def arguments(args: Any, kwargs: Any, result: Any) -> Callable[[], Mapping[str, Any]]:
        return lambda: {**signature.bind(*args, **kwargs).arguments, "result": result}

    def call(run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        result = None
        clock.enter(step)
        try:
            result = run()
            return result
        finally:
            clock.leave(arguments(args, kwargs, result))

    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items, end = function(*args, **kwargs), object()
            while (item := call(lambda: next(items, end), args, kwargs)) is not end:
                yield item

        return generate
    if inner is not None and inspect.isgeneratorfunction(inner):

        @contextmanager
        def manage(*args: Any, **kwargs: Any) -> Iterator[Any]:
            manager = function(*args, **kwargs)
            entered = call(manager.__enter__, args, kwargs)
            with ExitStack() as stack:
                stack.push(lambda *error: call(lambda: manager.__exit__(*error), args, kwargs))
                yield entered

        return manage

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(lambda: function(*args, **kwargs), args, kwargs)

    return run


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a clock of products of matrices."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := _OPERATIONS.get(func.overloadpacket):
            self._clock.product(count(args))
        return result


def _attention(args: Any) -> float:
    query, key = args[0], args[1]
    pairs: float = (
        math.prod(query.shape[:-1]) * int(key.shape[-2]) / 2
    )  # each token with itself and those before it
    return 4 * pairs * int(query.shape[-1])


_aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[[Any], float]] = {
    _aten.mm: lambda a: 2 * a[0].numel() * a[1].shape[-1],
    _aten.bmm: lambda a: 2 * a[0].numel() * a[1].shape[-1],
    _aten.addmm: lambda a: 2 * a[1].numel() * a[2].shape[-1],
    _aten.addmm_: lambda a: 2 * a[1].numel() * a[2].shape[-1],
    _aten.baddbmm: lambda a: 2 * a[1].numel() * a[2].shape[-1],
    _aten.linalg_solve_triangular: lambda a: a[0].shape[-1] * a[1].numel(),
    _aten.linalg_cholesky_ex: lambda a: a[0].numel() * a[0].shape[-1] / 3,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda a: 2.5 * _attention(a[1:]),
}
