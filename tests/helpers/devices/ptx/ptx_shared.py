"""Shared memory of blocks that run together: who has read and written each word since the last barrier.

Every *granule* (as many bytes as the kernel's narrowest access) has a tag for its last write and one for
its reads:

    epoch: 32 bits and up | warp's epoch: 20 bits | warp: 6 | lane: 6          63: several warps, several
    lanes

A block's epoch counts its barriers, a warp's those of the warp alone. Two accesses of a granule, one of
them a write, race when they are of one epoch and of two threads, except for lanes of one warp with a
barrier of the warp between.

Copies by cp.async land when the thread waits for their group and not before. Until then nobody may touch
their destination, and after it the thread alone until the next barrier.
"""

from dataclasses import dataclass

import numpy as np
from ptx_memory import Words
from ptx_text import PtxError

_LANE, _WARP, _WARP_EPOCH, _EPOCH = 0, 6, 12, 32
_SEVERAL = 63


@dataclass
class _Copy:
    """Copies of one instruction: lanes, numbers of their groups, places, sources, bytes, bytes to read."""

    lanes: np.ndarray
    group: np.ndarray
    to: np.ndarray
    source: np.ndarray
    size: int
    read: np.ndarray


class SharedMemory:
    """Of `blocks` blocks of `threads` threads, `size` bytes each, filled with noise.

    Lanes are numbered through all blocks; `at` are offsets in a block's memory.
    """

    def __init__(self, blocks, threads, size, granule, rng):
        self.size, self._threads, self._granule = size, threads, granule
        self._stride = -(-max(size, 16) // 16) * 16
        self._words = Words(rng.integers(0, 256, blocks * self._stride, np.uint8))
        count = blocks * self._stride // granule
        self._written, self._read = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._awaited = np.zeros(count, bool)
        self._known = np.zeros(count, bool)
        self.epoch = np.ones(blocks, np.int64)
        self._warp_epoch = np.zeros(blocks * threads // 32, np.int64)
        self._copies, self._groups = [], np.zeros(blocks * threads, np.int64)
        self.unwritten_reads = 0

    def pass_barrier(self, blocks):
        self.epoch[blocks] += 1

    def pass_warp_barrier(self, lanes):
        self._warp_epoch[lanes[::32] // 32] += 1

    def load(self, lanes, at, size, count):
        """`count` words of `size` bytes from each lane's offset."""
        places = self._places(lanes, at, size * count)
        granules, tags = self._granules(lanes, places, size * count)
        self._refuse(self._awaited[granules], "reads what a copy is under way to", lanes, at)
        self._refuse(_race(self._written[granules], tags), "reads what another thread wrote", lanes, at)
        self._note_reads(granules, tags)
        self.unwritten_reads += int((~self._known[granules]).any(axis=0).sum())
        return [self._words.load(places + i * size, size) for i in range(count)]

    def store(self, lanes, at, size, values):
        """Words of `size` bytes, side by side."""
        places = self._places(lanes, at, size * len(values))
        self._claim(lanes, at, places, size * len(values))
        for i, value in enumerate(values):
            self._words.store(places + i * size, size, value)

    def change(self, lanes, at, size):
        """Byte places of words that are changed atomically, which races with nothing."""
        places = self._places(lanes, at, size)
        granules, _ = self._granules(lanes, places, size)
        self._known[granules] = True
        return places, self._words

    def start_copy(self, lanes, at, source, size, read):
        """A copy of `size` bytes a lane, `read` of them from `source` and then zeros."""
        places = self._places(lanes, at, size)
        granules = self._claim(lanes, at, places, size)
        self._awaited[granules] = True
        self._copies.append(_Copy(lanes, self._groups[lanes], places, source, size, read))

    def close_group(self, lanes):
        self._groups[lanes] += 1

    def wait(self, lanes, pending, memory):
        """Ends all copies of the lanes but those of their `pending` latest closed groups."""
        until = np.full(len(self._groups), -1, np.int64)
        until[lanes] = self._groups[lanes] - pending
        left = []
        for copy in self._copies:
            done = copy.group < until[copy.lanes]
            if done.any():
                self._end(copy, done, memory)
            if not done.all():
                kept = ~done
                left.append(
                    _Copy(
                        copy.lanes[kept],
                        copy.group[kept],
                        copy.to[kept],
                        copy.source[kept],
                        copy.size,
                        copy.read[kept],
                    )
                )
        self._copies = left

    def _end(self, copy, done, memory):
        lanes, to, source, read = copy.lanes[done], copy.to[done], copy.source[done], copy.read[done]
        for i in range(0, copy.size, 4):
            inside = read > i
            values = np.zeros(len(lanes), np.uint32)
            values[inside] = memory.load(source[inside] + i, 4)
            self._words.store(to + i, 4, values)
        granules, tags = self._granules(lanes, to, copy.size)
        self._awaited[granules] = False
        self._written[granules] = tags

    def leave(self, lanes):
        """Raises PtxError where lanes end with copies under way."""
        for copy in self._copies:
            if np.isin(copy.lanes, lanes).any():
                raise PtxError("a thread ends with copies under way")

    def _claim(self, lanes, at, places, size):
        granules, tags = self._granules(lanes, places, size)
        self._refuse(self._awaited[granules], "writes where a copy is under way to", lanes, at)
        self._refuse(_race(self._written[granules], tags), "writes what another thread wrote", lanes, at)
        self._refuse(_race(self._read[granules], tags), "writes what another thread read", lanes, at)
        self._written[granules] = tags
        self._refuse(self._written[granules] != tags, "and another thread write at once", lanes, at)
        self._known[granules] = True
        return granules

    def _places(self, lanes, at, size):
        crooked, outside = at % size != 0, (at < 0) | (at + size > self.size)
        self._refuse(crooked[None], f"is not aligned to {size} bytes", lanes, at)
        self._refuse(outside[None], f"is outside of the block's {self.size} bytes", lanes, at)
        return lanes // self._threads * self._stride + at

    def _granules(self, lanes, places, size):
        """Granules [n, lanes] of words, and the tags [1, lanes] of their lanes."""
        first = places // self._granule
        granules = first + np.arange(size // self._granule)[:, None]
        thread = lanes % self._threads
        tags = self.epoch[lanes // self._threads] << _EPOCH
        tags |= self._warp_epoch[lanes // 32] << _WARP_EPOCH | thread // 32 << _WARP | thread % 32
        return granules, np.broadcast_to(tags, granules.shape)

    def _note_reads(self, granules, tags):
        wanted = _joined(self._read[granules], tags)
        self._read[granules] = wanted
        while True:  # where lanes read one granule together, the last one has left its mark alone
            seen = self._read[granules]
            wanted = _joined(seen, wanted)
            missing = seen != wanted
            if not missing.any():
                return
            self._read[granules[missing]] = wanted[missing]

    def _refuse(self, bad, what, lanes, at):
        if bad.any():
            lane = int(np.nonzero(bad)[1][0])
            thread = int(lanes[lane] % self._threads)
            raise PtxError(f"race or fault in shared memory: thread {thread} at byte {int(at[lane])} {what}")


def _field(tags, shift):
    return tags >> shift & _SEVERAL


def _race(tags, mine):
    """Whether an access with tag `mine` races with those that left the tags."""
    together = tags >> _EPOCH == mine >> _EPOCH
    if not together.any():
        return together
    same_time = tags >> _WARP_EPOCH == mine >> _WARP_EPOCH
    other_warp, other_lane = (
        _field(tags, _WARP) != _field(mine, _WARP),
        _field(tags, _LANE) != _field(mine, _LANE),
    )
    return together & (other_warp | other_lane & same_time)


def _joined(tags, mine):
    """Tags of reads that are joined by others."""
    together = tags >> _EPOCH == mine >> _EPOCH
    other_warp = together & (_field(tags, _WARP) != _field(mine, _WARP))
    other_lane = together & (other_warp | (_field(tags, _LANE) != _field(mine, _LANE)))
    joined = mine | np.where(other_lane, _SEVERAL << _LANE, 0)
    return np.where(other_warp, mine >> _EPOCH << _EPOCH | _SEVERAL << _WARP | _SEVERAL << _LANE, joined)
