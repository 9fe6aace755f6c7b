"""Runs launches of PTX kernels: many blocks at a time, all threads as lanes of numpy arrays.

The lanes that stand at the first piece of code, in the order of `ptx_order`, run it together; where threads
part, the ones behind so catch up with those ahead. Blocks are drawn in random order and run some at a time,
seeded: an order that a kernel relies on without asking for it shows under some seed. What a kernel must not
do is an error (`PtxError`): memory outside of live tensors or of the block's own, addresses that are not
aligned, read-only loads of what the launch writes, races in shared memory, copies under way that are read,
barriers and other instructions of whole warps that a part of one executes.

Not modelled: the order of memory accesses between blocks and fences, time, and what ptxas makes of the PTX.
"""

import contextlib
from collections import Counter, defaultdict

import numpy as np
from ptx_counts import Counts
from ptx_memory import GlobalMemory, Words
from ptx_program import Program
from ptx_shared import SharedMemory
from ptx_text import WINDOWS, PtxError, read_kernel, split_ptx

_AWAY = np.int64(1) << 40  # the place of lanes that wait or have ended
_LANES = 8192  # that run together, at most
_STEPS = 2_000_000


class Machine:
    """Kernels of a module for one target, ready to be launched.

    Attributes:
        memory: global memory.
        counts: figures by kernel.
        texts: the kernels' PTX by their names.
        executed: warps that have run each piece, by kernel.
        together: threads that run at a time, at most.
        steps: pieces that blocks run at most; more is a loop without end.
    """

    def __init__(self, texts, target, seed=0, lanes=_LANES):
        self.memory = GlobalMemory()
        self.counts = defaultdict(Counts)
        self._rng = np.random.default_rng(seed)
        self.texts = {name: own for text in texts for name, own in split_ptx(text).items()}
        self.executed = defaultdict(Counter)
        self.steps = _STEPS
        self.together = lanes
        self._programs, self._target = {}, target

    def program(self, name):
        """A kernel made ready to run, when it is first needed."""
        if name not in self._programs:
            self._programs[name] = Program(read_kernel(self.texts[name]), self._target)
        return self._programs[name]

    @contextlib.contextmanager
    def altered(self, name, text):
        """Another text for a kernel within the context, and a limit of steps."""
        before, steps = self.program(name), self.steps
        self._programs[name] = Program(read_kernel(text), self._target)
        try:
            yield
        finally:
            self._programs[name], self.steps = before, steps

    def executed_lines(self, name):
        """Lines of a kernel's text that have been executed."""
        return sorted(one.line for piece in self.executed[name] for one in self.program(name).code(piece))

    def seed(self, seed):
        self._rng = np.random.default_rng(seed)

    def launch(self, name, grid, block, arguments, dynamic=0):
        """Runs a kernel to its end.

        Args:
            name: as in the PTX.
            grid, block: three sizes each.
            arguments: the bytes of its parameters.
            dynamic: bytes of dynamic shared memory.

        Raises:
            PtxError: what the kernel does is wrong, or not known here.
        """
        program = self.program(name)
        threads = int(np.prod(block))
        if threads % 32 or threads > 1024:
            raise PtxError(f"{name}: {threads} threads a block; whole warps are known here, 1024 at most")
        if len(arguments) != program.kernel.parameter_bytes:
            wanted = program.kernel.parameter_bytes
            raise PtxError(f"{name}: {len(arguments)} bytes of arguments for {wanted} of parameters")
        self.memory.look()
        count = int(np.prod(grid))
        order = self._rng.permutation(count)
        self.memory.start()
        together = max(1, self.together // threads)
        with np.errstate(all="ignore"):
            for start in range(0, count, together):
                blocks = _Blocks(
                    self, program, order[start : start + together], grid, block, arguments, dynamic
                )
                blocks.run()
        try:
            self.memory.finish()
        except PtxError as error:
            raise PtxError(f"{name}: {error}") from error


class _Blocks:
    """Blocks that run together. Lanes count through all of them; `lanes` are those that run now."""

    def __init__(self, machine, program, numbers, grid, block, arguments, dynamic):
        kernel = program.kernel
        self.memory, self._rng = machine.memory, machine._rng
        self._counts, self._program = machine.counts[kernel.name], program
        self._threads = int(np.prod(block))
        self._count = len(numbers) * self._threads
        self._numbers, self._grid, self._block = numbers, grid, block
        size = kernel.bytes["shared"] + dynamic
        self.shared = SharedMemory(len(numbers), self._threads, size, program.granule, self._rng)
        self._local_bytes = -(-kernel.bytes["local"] // 16) * 16
        self._local = Words(self._rng.integers(0, 256, max(8, self._count * self._local_bytes), np.uint8))
        padded = bytes(arguments) + bytes(-len(arguments) % 8)
        self._parameters, self._parameter_bytes = Words(np.frombuffer(padded, np.uint8)), len(arguments)
        self._place = np.zeros(self._count, np.int64)  # piece of each lane
        self._after = np.zeros(self._count, np.int64)  # where lanes at a barrier go on
        self._waits = np.zeros(self._count, bool)
        self._ended = np.zeros(self._count, bool)
        self._state, self._scratch = [], []
        self._executed, self._steps = Counter(), machine.steps
        self._total = machine.executed[kernel.name]
        self.lanes = np.arange(self._count)

    def run(self):
        """Runs the blocks until all their threads have ended."""
        for _ in range(self._steps):
            piece = int(self._place.min())
            if piece < _AWAY:
                self.lanes = np.flatnonzero(self._place == piece)
                self._run(piece)
            elif self._waits.any():
                self._open_barriers()
            else:
                break
        else:
            raise PtxError(f"{self._program.kernel.name} does not end")
        self._total.update(self._executed)
        for number, warps in self._executed.items():
            for opcode, times in self._program.piece(number).opcodes.items():
                self._counts.instruction(opcode, warps * times)
        self._counts["shared reads of what nobody wrote"] += self.shared.unwritten_reads

    def _run(self, number):
        lanes = self.lanes
        try:
            piece = self._program.piece(number)
            self._grow()
            slots, whole = self._take(piece, lanes)
            self._executed[number] += 1 + int(np.count_nonzero(np.diff(lanes // 32)))
            for step in piece.steps:
                step(slots, self)
            self.lanes = lanes
            for slot in piece.outputs:
                if whole:
                    self._state[slot] = slots[slot]
                else:
                    self._state[slot] = self._register(slot).copy()  # registers may share an array
                    self._state[slot][lanes] = slots[slot]
            self._leave(piece, slots)
        except PtxError as error:
            lane = int(lanes[0])
            raise PtxError(f"{self._program.kernel.name}: block {self._block_of(lane)}: {error}") from error

    def _block_of(self, lane):
        return tuple(int(place) for place in self._coordinates(np.array([lane // self._threads]))[:, 0])

    def _coordinates(self, blocks):
        number, (x, y, _) = self._numbers[blocks], self._grid
        return np.stack([number % x, number // x % y, number // (x * y)])

    def _grow(self):
        """Makes room for slots of pieces that are new."""
        sizes = self._program.sizes
        for slot in range(len(self._state), len(sizes)):
            value = self._program.constants.get(slot)
            if slot in self._program.specials:
                value = self._special(self._program.specials[slot])
            self._state.append(value)
            self._scratch.append(value)

    def _special(self, name):
        name, _, axis = name.partition(".")
        lane = np.arange(self._count)
        thread = lane % self._threads
        x, y, _ = self._block
        if name == "tid":
            value = {"x": thread % x, "y": thread // x % y, "z": thread // (x * y)}[axis]
        elif name == "ctaid":
            value = self._coordinates(lane // self._threads)["xyz".index(axis)]
        elif name in ("ntid", "nctaid"):
            value = np.full(self._count, (self._block if name == "ntid" else self._grid)["xyz".index(axis)])
        elif name in ("laneid", "warpid"):
            value = thread % 32 if name == "laneid" else thread // 32
        elif name in ("SP", "SPL"):
            return None
        else:
            raise PtxError(f"special register %{name} is not known here")
        return value.astype(np.uint32)

    def _register(self, slot):
        """The values of a register for all lanes; noise where nobody wrote any."""
        if self._state[slot] is None:
            size = self._program.sizes[slot]
            noise = self._rng.integers(0, 256, self._count * max(size, 1), np.uint8)
            kinds = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
            self._state[slot] = (noise & 1).astype(bool) if size == 0 else noise.view(kinds[size])
        return self._state[slot]

    def _take(self, piece, lanes):
        whole = len(lanes) == self._count
        slots = self._scratch
        for slot in piece.inputs:
            value = self._register(slot)
            slots[slot] = value if whole else value[lanes]
        return slots, whole

    def _leave(self, piece, slots):
        lanes, end = self.lanes, piece.end
        if end is None:
            self._place[lanes] = piece.following
            return
        name = end.parts[0]
        chosen = None
        if piece.guard:
            chosen = slots[piece.guard[0]] ^ piece.guard[1]
            self._place[lanes] = piece.following
            lanes = lanes[chosen]
        if name == "bra":
            self._place[lanes] = piece.targets[0]
        elif name == "brx":
            index = slots[piece.selector] if chosen is None else slots[piece.selector][chosen]
            self._place[lanes] = np.array(piece.targets)[index.astype(np.int64)]
        elif name in ("ret", "exit"):
            self.shared.leave(lanes)
            self._place[lanes] = _AWAY
            self._ended[lanes] = True
        else:
            self._reach_barrier(piece, lanes)

    def _reach_barrier(self, piece, lanes):
        end = piece.end
        if not len(lanes):
            return
        if set(end.parts[1:]) - {"sync", "aligned", "cta"} or len(end.operands) != 1:
            raise end.error("is not known to this interpreter")
        here = np.zeros(self._count, bool)
        here[lanes] = True
        warps = here.reshape(-1, 32)
        partly = warps.any(1) & ~(warps | self._ended.reshape(-1, 32)).all(1)
        if partly.any():
            raise end.error("is executed by part of a warp")
        self._after[lanes] = piece.following
        self._place[lanes] = _AWAY
        self._waits[lanes] = True

    def _open_barriers(self):
        waits = self._waits.reshape(-1, self._threads)
        ready = waits.any(1)
        self.shared.pass_barrier(np.flatnonzero(ready))
        self._place[self._waits] = self._after[self._waits]
        self._waits[:] = False

    # ---- Memory -----------------------------------------------------------------------------------------

    def _spaces(self, space, at):
        """(space, which lanes or None for all, offsets) of addresses, generic ones by their windows."""
        if space is not None:
            return [(space, None, at)]
        found = []
        window = at & -(1 << 56)
        for name, start in (*WINDOWS.items(), ("global", 0)):
            inside = window == start
            if inside.all():
                return [(name, None, at - start)]
            if inside.any():
                found.append((name, np.flatnonzero(inside), at[inside] - start))
        return found

    def load(self, space, at, size, count, read_only):
        """`count` words of `size` bytes from each lane's address; `read_only`: nobody writes there."""
        lanes, parts = self.lanes, []
        for name, which, places in self._spaces(space, at):
            if read_only and name == "global":
                self.memory.promise(places, size * count)
            parts.append(
                (which, self._load(name, lanes if which is None else lanes[which], places, size, count))
            )
        if len(parts) == 1 and parts[0][0] is None:
            return parts[0][1]
        words = np.empty((count, len(lanes)), f"u{size}")
        for which, values in parts:
            words[:, which] = values
        return list(words)

    def _load(self, space, lanes, at, size, count):
        if space == "shared":
            self._counts.shared_access(lanes, at, size * count)
            return self.shared.load(lanes, at, size, count)
        if space == "global":
            self.memory.check(at, size * count)
            self._counts.global_access("loaded", lanes, at, size * count)
            return [self.memory.load(at + i * size, size) for i in range(count)]
        words, places = self._own(space, lanes, at, size * count)
        return [words.load(places + i * size, size) for i in range(count)]

    def _own(self, space, lanes, at, size):
        """Words and byte places in local memory or in the parameters."""
        if space == "local":
            words, places, limit = self._local, lanes * self._local_bytes + at, self._local_bytes
        else:
            words, places, limit = self._parameters, at, self._parameter_bytes
        if ((at % size != 0) | (at < 0) | (at + size > limit)).any():
            raise PtxError(f"{size} bytes at {int(at[0])} of {space} memory are not aligned or outside of it")
        return words, places

    def store(self, space, at, size, words):
        """Words of `size` bytes to each lane's address."""
        lanes = self.lanes
        for name, which, places in self._spaces(space, at):
            own = lanes if which is None else lanes[which]
            values = words if which is None else [word[which] for word in words]
            whole = size * len(words)
            if name == "shared":
                self._counts.shared_access(own, places, whole)
                self.shared.store(own, places, size, values)
                continue
            if name == "global":
                self.memory.check(places, whole)
                self.memory.note(places, whole)
                self._counts.global_access("stored", own, places, whole)
                target = self.memory
            elif name == "local":
                target, places = self._own(name, own, places, whole)
            else:
                raise PtxError("stores to its parameters")
            for i, value in enumerate(values):
                target.store(places + i * size, size, value)

    def change(self, space, at, view, values, operation):
        """Atomic operations, in random order of the lanes; the words before."""
        size = np.dtype(view).itemsize
        old = np.empty(len(at), f"u{size}")
        for name, which, places in self._spaces(space, at):
            index = np.arange(len(at)) if which is None else which
            if name == "global":
                self.memory.check(places, size)
                words = self.memory
            elif name == "shared":
                places, words = self.shared.change(self.lanes[index], places, size)
            else:
                raise PtxError(f"changes {name} memory atomically")
            for i in self._rng.permutation(len(index)):
                place = places[i : i + 1]
                before = words.load(place, size)
                old[index[i]] = before[0]
                after = operation(before.view(view)[0], values[index[i]])
                words.store(place, size, np.array([after], view).view(before.dtype))
        return old

    def start_copy(self, to, source, size, read):
        """cp.async of `size` bytes a lane, `read` of them from global memory."""
        some = read > 0
        if some.any():
            self.memory.check(source[some], size)
            self._counts.global_access("copied", self.lanes[some], source[some], size)
        self.shared.start_copy(self.lanes, to, source, size, read)
