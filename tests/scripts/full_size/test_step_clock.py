import sys
import types
from contextlib import contextmanager

import pytest
import torch

from dbrx_quant.quantize.solve import ldlq, prepare
from dbrx_quant.scripts.full_size import step_clock
from dbrx_quant.scripts.full_size.step_clock import REST, Clock, Step, replaced, timed


class Time:
    """Goes on only where a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return 2 * self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(step_clock, "time", time)
    return time


@pytest.fixture
def program(monkeypatch, time):
    """A program of a few steps, as a module of the package."""
    module = types.ModuleType("dbrx_quant.a_program")

    def inner(seconds):
        time.passes(seconds)
        return seconds

    def outer(seconds):
        time.passes(1)
        module.inner(seconds)
        time.passes(2)

    def items():
        for _ in range(3):
            time.passes(5)
            yield module.inner(1)

    @contextmanager
    def manager():
        time.passes(10)
        yield "opened"
        time.passes(20)

    def failing():
        time.passes(7)
        raise KeyError("expected")

    class Owner:
        def method(self, x):
            time.passes(4)
            return x + 1

        @staticmethod
        def static(x):
            time.passes(6)
            return x + 2

    for value in (inner, outer, items, manager, failing, Owner):
        setattr(module, value.__name__, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def step(name, place=None, **more):
    return Step(name, f"dbrx_quant.a_program:{place or name}", **more)


def seconds(clock, phase="phase"):
    return {name: total.seconds for name, total in clock.phases[phase].items()}


def calls(clock, phase="phase"):
    return {name: total.calls for name, total in clock.phases[phase].items()}


def test_a_step_has_its_own_time_and_the_rest_what_is_left(program, time):
    clock = Clock()
    with timed(clock, [step("outer"), step("inner")]), clock.phase("phase"):
        time.passes(100)
        program.outer(50)
    assert seconds(clock) == {REST: 100, "outer": 3, "inner": 50}
    assert calls(clock) == {REST: 0, "outer": 1, "inner": 1}
    assert clock.spent == {"phase": 153}
    assert clock.phases["phase"]["inner"].processor == 100


def test_what_runs_outside_of_phases_is_not_counted(program, time):
    clock = Clock()
    with timed(clock, [step("outer"), step("inner")]):
        program.outer(50)
        with clock.phase("one"):
            program.inner(1)
        program.outer(50)
        with clock.phase("two"):
            program.inner(2)
    assert seconds(clock, "one") == {REST: 0, "inner": 1}
    assert seconds(clock, "two") == {REST: 0, "inner": 2}


def test_the_body_of_a_loop_or_a_with_block_is_not_part_of_its_step(program, time):
    clock = Clock()
    steps = [step("items"), step("manager"), step("inner")]
    with timed(clock, steps), clock.phase("phase"):
        assert [program.inner(30) for _ in program.items()] == [30, 30, 30]
        with program.manager() as opened:
            assert opened == "opened"
            time.passes(1000)
    assert seconds(clock) == {"items": 15, "inner": 93, "manager": 30, REST: 1000}


def test_errors_pass_through_and_are_timed(program, time):
    clock = Clock()
    with timed(clock, [step("failing"), step("manager")]), clock.phase("phase"):
        with pytest.raises(KeyError):
            program.failing()
        with pytest.raises(ZeroDivisionError), program.manager():
            raise ZeroDivisionError
    assert seconds(clock) == {REST: 0, "failing": 7, "manager": 10}


def test_steps_inside_a_scope_are_counted_under_both_names(program, time):
    clock = Clock()
    with timed(clock, [step("outer", scope=True), step("inner")]), clock.phase("phase"):
        program.outer(50)
        program.inner(1)
    assert seconds(clock) == {REST: 0, "outer": 3, "outer: inner": 50, "inner": 1}


def test_what_stands_for_more_counts_more_but_for_what_runs_once(program, time):
    clock = Clock()
    with timed(clock, [step("outer", once=True), step("inner")]), clock.phase("phase"):
        time.passes(1)
        clock.stand_for(8)
        time.passes(1)
        program.inner(2)
        program.outer(3)
        program.inner(2)
        clock.stand_for(1)
        program.inner(2)
    assert seconds(clock) == {REST: 9, "inner": 16 + 3 + 16 + 2, "outer": 3}
    assert calls(clock) == {REST: 0, "inner": 8 + 1 + 8 + 1, "outer": 1}
    assert clock.spent["phase"] == 14


def test_counts_see_the_arguments_and_the_result(program, time):
    clock, owner = Clock(), program.Owner()
    method = step(
        "method",
        "Owner.method",
        operations=lambda call: call["x"],
        moved=lambda call: call["result"] if call["self"] is owner else 0,
    )
    with timed(clock, [method]), clock.phase("phase"):
        assert owner.method(5) == 6
        clock.stand_for(2)
        assert owner.method(x=7) == 8
    with timed(clock, [step("static", "Owner.static")]), clock.phase("other"):
        assert owner.static(1) == program.Owner.static(1) == 3
    assert seconds(clock, "other") == {REST: 0, "static": 24}  # each still stands for two
    total = clock.phases["phase"]["method"]
    assert (total.operations, total.moved) == (5 + 14, 6 + 16)
    assert owner.method(1) == 2
    assert total.calls == 3


def test_products_of_matrices_are_counted_where_a_step_says_nothing_else(program, time, monkeypatch):
    clock = Clock()
    program.inner = lambda x: torch.nn.functional.linear(x, torch.ones(5, 4))  # 2 x 3 x 4 x 5
    program.outer = lambda: torch.ones(7, 6) @ torch.ones(6, 5)
    steps = [step("inner"), step("outer", operations=lambda call: 1)]
    with timed(clock, steps), clock.phase("phase"):
        program.inner(torch.ones(3, 4))
        program.inner(torch.ones(2, 3, 4))
        program.outer()
        torch.ones(2, 2).addmm_(torch.ones(2, 3), torch.ones(3, 2))
        x = torch.ones(3, 4, requires_grad=True)
        (x @ torch.ones(4, 5)).sum().backward()
    counted = {name: total.operations for name, total in clock.phases["phase"].items()}
    assert counted == {"inner": 3 * 120, "outer": 1, REST: 24 + 2 * 120}


def test_a_function_is_replaced_wherever_it_is_known_and_put_back():
    before = ldlq.factorize
    assert prepare.factorize is before
    with replaced("dbrx_quant.quantize.solve.ldlq:factorize", lambda function: lambda *_: function):
        assert ldlq.factorize() is before
        assert prepare.factorize() is before
    assert ldlq.factorize is prepare.factorize is before


@pytest.mark.parametrize("place", ["ldlq:gone", "ldlq:Factor.gone", "ldlq:Gone.factorize"])
def test_a_step_that_is_not_there_any_more_is_told(place):
    with (
        pytest.raises(ValueError, match="there is no such function"),
        timed(Clock(), [Step("x", f"dbrx_quant.quantize.solve.{place}")]),
    ):
        pass
