"""Instructions that do more than compute: memory, copies, whole warps, vectors of registers.

Each maker takes the program and an instruction, and gives a function of (slots, machine), or None where the
instruction only computes. A suffix that is not named here makes the instruction unknown.
"""

import numpy as np
from ptx_fragments import SHAPES, multiply
from ptx_halves import halves
from ptx_text import SIZES, WINDOWS, Register
from ptx_types import SIGNED, UNSIGNED

SPACES = ("global", "shared", "local", "param")
_IGNORED = {  # on caches and order, which are not modelled
    *(
        "nc",
        "cg",
        "ca",
        "cs",
        "lu",
        "cv",
        "wb",
        "wt",
        "relaxed",
        "acquire",
        "release",
        "acq_rel",
        "volatile",
        "weak",
    ),
    *(
        "gpu",
        "cta",
        "sys",
        "cluster",
        "L1::no_allocate",
        "L1::evict_first",
        "L1::evict_last",
        "L1::evict_normal",
    ),
    *("L2::64B", "L2::128B", "L2::256B", "L2::cache_hint", "L2::evict_first", "L2::evict_last", "entry"),
}
NEEDS = {  # compute capability → instructions that came with it
    70: ("mma.sync.aligned.m8n8k4",),
    75: ("mma.sync.aligned.m16n8k8", "ldmatrix"),
    80: ("mma.sync.aligned.m16n8k16", "cp.async", "redux"),
    90: ("cp.async.bulk", "wgmma", "griddepcontrol", "mbarrier.try_wait", "barrier.cluster"),
}


def _place(instruction):
    """(space or None for generic, words) of a load or store."""
    parts = instruction.parts[1:-1]
    space = next((part for part in parts if part in SPACES), None)
    count = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
    strange = set(parts) - set(SPACES) - {"v2", "v4"} - _IGNORED
    if strange:
        raise instruction.error(f"suffix {', '.join(sorted(strange))} is not known here")
    return space, count


def _vector(operand):
    return operand if isinstance(operand, tuple) else (operand,)


def load(program, instruction):
    space, count = _place(instruction)
    kind = instruction.parts[-1]
    size = SIZES[kind]
    address = program.address(instruction.operands[1], instruction)
    registers = _vector(instruction.operands[0])
    targets = [program.target(one, instruction) for one in registers]
    wide = [UNSIGNED[one.size] if isinstance(one, Register) else None for one in registers]
    read_only = "nc" in instruction.parts

    def step(slots, machine):
        words = machine.load(space, address(slots, machine), size, count, read_only)
        for target, word, register in zip(targets, words, wide, strict=True):
            if target is None:
                continue
            if register is not word.dtype.type:
                signed = kind[0] == "s"
                word = (word.view(SIGNED[size]) if signed else word).astype(register)
            slots[target] = word

    return step


def store(program, instruction):
    space, _ = _place(instruction)
    size = SIZES[instruction.parts[-1]]
    address = program.address(instruction.operands[0], instruction)
    sources = [program.source(one, size, instruction) for one in _vector(instruction.operands[1])]

    def step(slots, machine):
        words = [
            np.broadcast_to(slots[source].astype(UNSIGNED[size], copy=False), len(machine.lanes))
            for source in sources
        ]
        machine.store(space, address(slots, machine), size, words)

    return step


def convert_address(program, instruction):
    """cvta: between the addresses of a space and generic ones."""
    parts = instruction.parts
    to_space = parts[1] == "to"
    window = WINDOWS.get(parts[2 if to_space else 1], 0)
    change = np.uint64(window if not to_space else (1 << 64) - window & (1 << 64) - 1)
    target = program.target(instruction.operands[0], instruction)
    source = program.source(instruction.operands[1], 8, instruction)

    def step(slots, machine):
        value = slots[source] + change
        slots[target] = value if np.ndim(value) else np.full(len(machine.lanes), value)

    return step


def move(program, instruction):
    """mov of a register into parts, or of parts into a register; plain ones compute."""
    to, of = instruction.operands
    size = SIZES[instruction.parts[-1]]
    if isinstance(to, tuple):
        part = size // len(to)
        targets = [program.target(one, instruction) for one in to]
        source = program.source(of, size, instruction)

        def split(slots, machine):
            value = np.broadcast_to(slots[source], len(machine.lanes))
            for i, target in enumerate(targets):
                if target is not None:
                    slots[target] = (value >> value.dtype.type(8 * part * i)).astype(UNSIGNED[part])

        return split
    if isinstance(of, tuple):
        part = size // len(of)
        target = program.target(to, instruction)
        sources = [program.source(one, part, instruction) for one in of]

        def join(slots, machine):
            value = np.zeros(len(machine.lanes), UNSIGNED[size])
            for i, source in enumerate(sources):
                value |= slots[source].astype(UNSIGNED[size]) << UNSIGNED[size](8 * part * i)
            slots[target] = value

        return join
    return None


def change(program, instruction):
    """atom and red: 32-bit integers and floats in global or shared memory."""
    parts = instruction.parts
    name, kind = parts[-2], parts[-1]
    space = next((part for part in parts if part in ("global", "shared")), None)
    strange = set(parts[1:-2]) - {"global", "shared"} - _IGNORED
    operations = {
        "add": lambda old, new: old + new,
        "exch": lambda old, new: new,
        "min": min,
        "max": max,
        "and": lambda old, new: old & new,
        "or": lambda old, new: old | new,
        "xor": lambda old, new: old ^ new,
        "inc": lambda old, new: 0 if old >= new else old + 1,
    }
    view = {"f32": np.float32, "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "u64": np.uint64}.get(
        kind
    )
    if strange or name not in operations or view is None:
        raise instruction.error("is not known to this interpreter")
    to = instruction.operands[0] if parts[0] == "atom" else None
    target = program.target(to, instruction) if to else None
    place, value = instruction.operands[1:3] if to else instruction.operands[:2]
    address, source = program.address(place, instruction), program.source(value, SIZES[kind], instruction)

    def step(slots, machine):
        values = np.broadcast_to(slots[source], len(machine.lanes)).view(view)
        old = machine.change(space, address(slots, machine), view, values, operations[name])
        if target is not None:
            slots[target] = old

    return step


def copy(program, instruction):
    """cp.async and its groups."""
    parts = instruction.parts
    if parts[1:3] == ["async", "commit_group"]:
        return lambda slots, machine: machine.shared.close_group(machine.lanes)
    if parts[1] == "async" and parts[2] in ("wait_group", "wait_all"):
        pending = instruction.operands[0].bits if instruction.operands else 0

        def wait(slots, machine):
            if parts[2] == "wait_all":
                machine.shared.close_group(machine.lanes)
            machine.shared.wait(machine.lanes, pending, machine.memory)

        return wait
    if parts[1] != "async" or parts[2] not in ("ca", "cg") or parts[3:5] != ["shared", "global"]:
        raise instruction.error("is not known to this interpreter")
    to, of, size, *rest = instruction.operands
    to, of, size = program.address(to, instruction), program.address(of, instruction), size.bits
    rest = [one for one in rest if "cache_hint" not in instruction.opcode or one is not rest[-1]]
    read = program.source(rest[0], 4, instruction) if rest else program.constant(size, 4)

    def step(slots, machine):
        count = np.broadcast_to(slots[read], len(machine.lanes)).astype(np.int64)
        machine.start_copy(to(slots, machine), of(slots, machine), size, count)

    return step


def whole_warps(instruction, machine):
    """The number of warps of the set; PtxError where one is not whole."""
    lanes = machine.lanes
    if len(lanes) % 32 == 0:
        table = lanes.reshape(-1, 32)
        if (table == table[:, :1] // 32 * 32 + np.arange(32)).all():
            return len(table)
    raise instruction.error("is executed by part of a warp")


def matrix_product(program, instruction):
    parts = instruction.parts
    if (
        parts[1:3] != ["sync", "aligned"]
        or parts[3] not in SHAPES
        or parts[4:6] != ["row", "col"]
        or len(parts) != 10
    ):
        raise instruction.error("is not known to this interpreter")
    shape = SHAPES[parts[3]]
    if (parts[6], parts[9]) != ("f32", "f32") or parts[7] != parts[8] or parts[7] not in ("f16", "bf16"):
        raise instruction.error("types are not known to this interpreter")
    targets = [program.target(one, instruction) for one in instruction.operands[0]]
    a, b, c = ([program.source(one, 4, instruction) for one in vector] for vector in instruction.operands[1:])
    brain = parts[7] == "bf16"

    def elements(slots, sources, warps):
        words = np.stack([np.broadcast_to(slots[source], 32 * warps) for source in sources])
        if brain:
            values = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], axis=-1).view(
                np.float32
            )
        else:
            values = halves(words.reshape(-1))
        return values.reshape(len(sources), warps, 32, 2).transpose(1, 0, 3, 2).reshape(warps, -1, 32)

    def step(slots, machine):
        warps = whole_warps(instruction, machine)
        sums = np.stack([np.broadcast_to(slots[source], 32 * warps) for source in c]).view(np.float32)
        sums = sums.reshape(len(c), warps, 32).transpose(1, 0, 2)
        total = multiply(shape, elements(slots, a, warps), elements(slots, b, warps), sums).view(np.uint32)
        for i, target in enumerate(targets):
            slots[target] = total[:, i].reshape(-1)

    return step


def _all_lanes(slots, mask, instruction):
    if (slots[mask] != 0xFFFFFFFF).any():
        raise instruction.error("names part of a warp, which is not known here")


def vote(program, instruction):
    mode = instruction.parts[2]
    if instruction.parts[1] != "sync" or mode not in ("ballot", "any", "all", "uni"):
        raise instruction.error("is not known to this interpreter")
    to, of, members = instruction.operands
    target = program.target(to, instruction)
    source, mask = program.source(of, 0, instruction), program.source(members, 4, instruction)
    negated = isinstance(of, Register) and of.negated

    def step(slots, machine):
        warps = whole_warps(instruction, machine)
        _all_lanes(slots, mask, instruction)
        votes = np.broadcast_to(slots[source], 32 * warps).reshape(-1, 32) ^ negated
        if mode == "ballot":
            found = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            found = {"any": votes.any(1), "all": votes.all(1), "uni": votes.all(1) | ~votes.any(1)}[mode]
        slots[target] = np.repeat(found, 32)

    return step


def shuffle(program, instruction):
    mode = instruction.parts[2]
    if instruction.parts[1] != "sync" or mode not in ("up", "down", "bfly", "idx"):
        raise instruction.error("is not known to this interpreter")
    to = [program.target(one, instruction) for one in _vector(instruction.operands[0])]
    source, other, clamp, mask = (program.source(one, 4, instruction) for one in instruction.operands[1:])
    lane = np.arange(32)

    def step(slots, machine):
        warps = whole_warps(instruction, machine)
        _all_lanes(slots, mask, instruction)
        value, by, limits = (
            np.broadcast_to(slots[slot], 32 * warps).reshape(-1, 32).astype(np.int64)
            for slot in (source, other, clamp)
        )
        by, segment = by & 31, limits >> 8 & 31
        last = lane & segment | limits & 31 & ~segment
        first = lane & segment
        place = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[mode]
        inside = place >= last if mode == "up" else place <= last
        place = np.where(inside, place, lane)
        slots[to[0]] = np.take_along_axis(value, place, 1).astype(np.uint32).reshape(-1)
        if len(to) > 1 and to[1] is not None:
            slots[to[1]] = inside.reshape(-1)

    return step


def warp_barrier(program, instruction):
    def step(slots, machine):
        whole_warps(instruction, machine)
        machine.shared.pass_warp_barrier(machine.lanes)

    return step


def nothing(program, instruction):
    return lambda slots, machine: None


ACTIONS = {
    "ld": load,
    "st": store,
    "cvta": convert_address,
    "mov": move,
    "atom": change,
    "red": change,
    "cp": copy,
    "mma": matrix_product,
    "vote": vote,
    "shfl": shuffle,
    "bar": warp_barrier,  # of a warp: those of a block end a piece
    "membar": nothing,
    "fence": nothing,
    "prefetch": nothing,
    "griddepcontrol": nothing,  # launches run one after another
}
