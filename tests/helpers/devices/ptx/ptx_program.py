"""Kernels made ready to run: straight pieces of code, each a list of functions of a list of registers.

A *slot* holds a register, a special register or a constant. A piece runs for a set of lanes that are at its
start: it takes its inputs from the lanes' registers, computes on arrays with one element a lane of the set,
and gives its outputs back. Registers that one piece alone uses never leave it.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from ptx_actions import ACTIONS, NEEDS
from ptx_arithmetic import function_of, source_sizes
from ptx_order import flow_order
from ptx_text import SIZES, Address, Constant, PtxError, Register, Special, Symbol
from ptx_types import UNSIGNED

_ENDS = ("bra", "brx", "ret", "exit", "bar", "barrier")
_WITHOUT_TARGET = ("st", "red", "cp", "membar", "fence", "prefetch", "griddepcontrol", *_ENDS)


@dataclass
class Piece:
    """Straight code.

    Attributes:
        steps: functions of (slots, machine).
        inputs, outputs: slots that are taken from the lanes and given back.
        opcodes: how often each stands here, its end included.
        end: the instruction that ends the piece, or None where the next piece follows.
        guard: the slot of the end's predicate, and whether it is negated.
        following, targets: pieces that come next in the text, or that the end branches to.
        selector: the slot that picks one of several targets.
    """

    steps: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    opcodes: Counter = field(default_factory=Counter)
    end: object = None
    guard: tuple | None = None
    following: int | None = None
    targets: list = field(default_factory=list)
    selector: int | None = None


def _ends_a_piece(instruction):
    return instruction.parts[0] in _ENDS and instruction.parts[:2] != ["bar", "warp"]


class Program:
    """A kernel as pieces; `constants` are slots and their values, `specials` slots and names."""

    def __init__(self, kernel, target):
        self.kernel = kernel
        self.sizes = []  # of slots; None for constants and specials
        self.constants, self.specials = {}, {}
        self._slots = {}
        self._target = target
        starts = {0, *kernel.labels.values()}
        starts |= {i + 1 for i, one in enumerate(kernel.code) if _ends_a_piece(one)}
        starts = sorted(start for start in starts if start < len(kernel.code))
        texts = [kernel.code[a:b] for a, b in zip(starts, [*starts[1:], len(kernel.code)], strict=True)]
        at = {start: number for number, start in enumerate(starts)}
        flow = [self._flow(code, number, at) for number, code in enumerate(texts)]
        order = flow_order(
            [[one for one in (following, *targets) if one is not None] for following, targets in flow]
        )
        rank = {number: place for place, number in enumerate(order)}
        self._code = [texts[number] for number in order]
        self._flows = [
            (rank.get(flow[number][0]), [rank[one] for one in flow[number][1]]) for number in order
        ]
        self.granule = self._narrowest()
        self._reads, self._writes = zip(*map(self._uses, self._code), strict=True)
        self._shared_slots = set().union(*self._reads)
        self._pieces = [None] * len(self._code)
        for instruction in kernel.code:
            self._require_target(instruction)

    def _flow(self, code, number, at):
        """(the piece that follows or None, those that a branch leads to) of a piece."""
        end = code[-1]
        name = end.parts[0]
        targets = []
        if name == "bra":
            targets = [at[self.kernel.labels[end.operands[0].name]]]
        elif name == "brx":
            targets = [at[self.kernel.labels[one]] for one in self.kernel.tables[end.operands[1].name]]
        leaves = name in ("bra", "brx", "ret", "exit") and end.guard is None
        return None if leaves else number + 1, targets

    def piece(self, number):
        """A piece, made when it is first needed."""
        if self._pieces[number] is None:
            self._pieces[number] = self._make(number)
        return self._pieces[number]

    def code(self, number):
        """The instructions of a piece."""
        return self._code[number]

    def _narrowest(self):
        sizes = [
            SIZES[one.parts[-1]]
            for one in self.kernel.code
            if one.parts[0] in ("ld", "st", "atom", "red")
            and not {"global", "param", "local"} & set(one.parts)
        ]
        return min(sizes, default=4)

    def _require_target(self, instruction):
        for needed, words in NEEDS.items():
            if self._target < needed and any(instruction.opcode.startswith(word) for word in words):
                raise instruction.error(f"needs sm_{needed}, the module is for sm_{self._target}")

    # ---- Slots ------------------------------------------------------------------------------------------

    def _slot(self, key, size):
        if key not in self._slots:
            self._slots[key] = len(self.sizes)
            self.sizes.append(size)
        return self._slots[key]

    def constant(self, bits, size):
        """The slot of a constant of `size` bytes."""
        kind = UNSIGNED[size]
        value = kind(bool(bits)) if size == 0 else kind(bits & (1 << 8 * size) - 1)
        slot = self._slot((int(value), size), None)
        self.constants[slot] = value
        return slot

    def source(self, operand, size, instruction):
        """The slot of a source of `size` bytes."""
        if isinstance(operand, Register):
            return self._slot(operand.name, operand.size)
        if isinstance(operand, Constant):
            return self.constant(operand.bits, size)
        if isinstance(operand, Special):
            slot = self._slot("%" + operand.name, None)
            self.specials[slot] = operand.name
            return slot
        if isinstance(operand, Symbol) and operand.name in self.kernel.variables:
            return self.constant(self.kernel.variables[operand.name][1], size)
        if isinstance(operand, Symbol) and operand.name in self.kernel.parameters:
            return self.constant(self.kernel.parameters[operand.name], size)
        raise instruction.error(f"operand not known here: {operand}")

    def target(self, operand, instruction):
        """The slot of a destination; None for the sink."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return None
        if not isinstance(operand, Register):
            raise instruction.error(f"destination not known here: {operand}")
        return self._slot(operand.name, operand.size)

    def _uses(self, code):
        """(registers read before they are written, registers written) of straight code, as slots."""
        read, written = set(), set()
        for instruction in code:
            sources, targets = operands(instruction)
            names = [one for one in _registers(sources) if not isinstance(one, Constant)]
            if instruction.guard:
                names += [instruction.guard, *_registers(targets)]  # what is not written keeps its value
            read |= {self.source(one, 0, instruction) for one in names} - written
            written |= {self.target(one, instruction) for one in _registers(targets)}
        return read, written

    # ---- Pieces -----------------------------------------------------------------------------------------

    def _make(self, number):
        code = self._code[number]
        piece = Piece(
            inputs=sorted(slot for slot in self._reads[number]),
            outputs=sorted(self._writes[number] & self._shared_slots),
            opcodes=Counter(one.opcode for one in code),
            following=self._flows[number][0],
            targets=self._flows[number][1],
        )
        for instruction in code:
            if _ends_a_piece(instruction):
                self._close(piece, instruction)
            else:
                piece.steps.append(self._step(instruction))
        return piece

    def _close(self, piece, instruction):
        piece.end = instruction
        if instruction.guard:
            piece.guard = (self.source(instruction.guard, 0, instruction), instruction.guard.negated)
        if instruction.parts[0] == "brx":
            piece.selector = self.source(instruction.operands[0], 4, instruction)

    def _step(self, instruction):
        guard = instruction.guard
        guarded = (self.source(guard, 0, instruction), guard.negated) if guard else None
        action = ACTIONS.get(instruction.parts[0])
        made = action(self, instruction) if action else None
        if made is not None:
            return _guarded_action(made, guarded, self._action_targets(instruction)) if guarded else made
        function = function_of(instruction)
        if function is None:
            raise instruction.error("is not known to this interpreter")
        target, *sources = instruction.operands
        sizes = source_sizes(instruction)  # of fewer than all where the last is part of the function
        slots = [self.source(one, size, instruction) for one, size in zip(sources, sizes, strict=False)]
        negated = [i for i, one in enumerate(sources) if isinstance(one, Register) and one.negated]
        if negated:
            function = _with_negated(function, negated)
        return _computed(function, self.target(target, instruction), slots, guarded, target.size)

    def _action_targets(self, instruction):
        return [self.target(one, instruction) for one in _registers(operands(instruction)[1])]

    def address(self, operand, instruction):
        """A function of slots that gives the int64 offsets of an address."""
        if not isinstance(operand, Address):
            raise instruction.error(f"is no address: {operand}")
        slot, offset = self.source(operand.base, 8, instruction), operand.offset
        return partial(_offset, slot=slot, offset=offset)


def _offset(slots, machine, slot, offset):
    base = slots[slot].astype(np.int64) + offset
    return base if np.ndim(base) else np.full(len(machine.lanes), base)


def operands(instruction):
    """(sources, destinations) of an instruction."""
    name, given = instruction.parts[0], instruction.operands
    if name in _WITHOUT_TARGET:
        return given, ()
    return given[1:], given[:1]


def _registers(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _registers(value)
        elif isinstance(value, Address):
            yield from _registers((value.base,))
        elif isinstance(value, (Register, Special)):
            yield value


def _with_negated(function, negated):
    def run(*sources):
        return function(*(~source if i in negated else source for i, source in enumerate(sources)))

    return run


def _computed(function, target, sources, guarded, size):
    """A step that only computes."""
    kind = UNSIGNED[size]
    if guarded:
        predicate, negated = guarded

        def step(slots, machine):
            chosen = slots[predicate] ^ negated
            value = function(*[slots[source] for source in sources])
            slots[target] = np.where(chosen, value, slots[target]).astype(kind, copy=False)

        return step

    def step(slots, machine):
        value = function(*[slots[source] for source in sources])
        if value.ndim == 0:
            value = np.full(len(machine.lanes), value)
        slots[target] = value if value.dtype == kind else _fitted(value, kind)

    return step


def _fitted(value, kind):
    if kind is np.bool_ or value.dtype == bool:
        raise PtxError(f"a value of {value.dtype} for a register of {kind.__name__}")
    return value.astype(kind)


def _guarded_action(action, guarded, targets):
    """An action for the lanes whose guard holds: the others' destinations stay."""
    predicate, negated = guarded

    def step(slots, machine):
        chosen = np.flatnonzero(np.broadcast_to(slots[predicate], len(machine.lanes)) ^ negated)
        if not len(chosen):
            return
        lanes = machine.lanes
        inner = _Chosen(slots, chosen)
        machine.lanes = lanes[chosen]
        action(inner, machine)
        machine.lanes = lanes
        for target in targets:
            value = slots[target].copy()
            value[chosen] = inner[target]
            slots[target] = value

    return step


class _Chosen(dict):
    """Slots of some lanes of the set, taken when they are read."""

    def __init__(self, slots, chosen):
        super().__init__()
        self._slots, self._chosen = slots, chosen

    def __missing__(self, slot):
        value = self._slots[slot]
        return value[self._chosen] if np.ndim(value) else value
