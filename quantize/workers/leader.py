"""Rank 0 of several workers: drives the conversion, hands out the tasks of experts, and takes part in them.

Expert e belongs to worker e modulo their number. Rank 0 does its own tasks while those of others are not
done, and gives the results on in the experts' order.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Result, Task
from dbrx_quant.calibration.blocks.model import Routing
from dbrx_quant.calibration.blocks.walk import Turn
from dbrx_quant.quantize.workers.board import Board
from dbrx_quant.quantize.workers.exchange import Exchange
from dbrx_quant.quantize.workers.peers import Peers, until_visible
from dbrx_quant.quantize.workers.tasks import load_tensors
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.sealed import remove, seal

END = "end"  # the kind of the last call


@dataclass(frozen=True)
class _Call:
    """A task that has been handed out.

    Attributes:
        number: of the call.
        title: of the task, for people.
        owners: the rank of each expert's worker.
        taken: the experts whose files have been taken from workers that send them.
    """

    number: int
    title: str
    owners: Mapping[int, int]
    taken: dict[int, Path]

    def key(self, expert: int) -> str:
        """Where the expert's worker tells that it is done."""
        return f"done/{self.number}/{expert}"


class Leader(Peers):
    """The crew of rank 0.

    Args:
        board: of all workers.
        exchange: of its files.
    """

    def __init__(self, board: Board, exchange: Exchange) -> None:
        super().__init__(board, exchange)
        self._calls = 0
        self._routing: tuple[Routing, Path] | None = None

    def each(self, task: Task, turns: Iterable[Turn]) -> Iterator[tuple[Turn, Result]]:
        """Have a task done for experts of one block; yields turns and results in their order."""
        every = list(turns)
        owners = {t.expert: 0 if task.only_here(t) else t.expert % self.board.size for t in every}
        call = self._hand_out(task, owners)
        own, made = deque(t for t in every if not owners[t.expert]), dict[int, Result]()
        for turn in every:
            while own and turn.expert not in made and not self._is_done(call, turn.expert):
                next_one = own.popleft()
                self.board.note(f"{call.title}, expert {next_one.expert}")
                made[next_one.expert] = task.do(next_one)
                self._take_finished(call)
            if turn.expert in made:
                yield turn, made.pop(turn.expert)
            else:
                path = self._take(call, turn.expert)
                yield turn, load_tensors(path)
                remove(path)

    def note(self, what: str) -> None:
        """Note what this process is at."""
        self.board.note(what)

    def end(self) -> list[float]:
        """Let the others go; the seconds that each worker has waited for others."""
        self.board.put(f"call/{self._calls}", {"kind": END})
        others = [self.board.take(f"left/{rank}", [rank], f"rank {rank}") for rank in self.board.others]
        return [self.board.waited, *map(float, others)]

    def _hand_out(self, task: Task, owners: Mapping[int, int]) -> _Call:
        """Tell the others of a task."""
        described, number = task.described(), self._calls
        self._known.update(self.exchange.relative(path) for path in described.files)
        call = _Call(number, f"{described.kind}, block {described.block}", owners, {})
        experts = [expert for expert, rank in owners.items() if rank]
        if not experts:
            return call
        self._calls += 1
        paths, files = dict(described.paths), list(described.files)
        if self._routing is None or self._routing[0] is not task.routing:  # tasks of a block share it
            self._routing = task.routing, self._write(f"routing-{number}", task.routing.tensors)
            files.append(self._routing[1])
        paths["routing"] = self._routing[1]
        if described.tensors:
            paths["tensors"] = self._write("tensors", described.tensors)
            files.append(paths["tensors"])
        offered = self.exchange.offer(files)
        message: dict[str, Any] = {"kind": described.kind, "block": described.block, "facts": described.facts}
        named = {name: self.exchange.relative(path) for name, path in paths.items()}
        message |= {"paths": named, "files": offered, "experts": experts}
        self.board.put(f"call/{number}", message)
        for rank in sorted(self.exchange.remote):
            self.board.note(f"{call.title}, sending files to rank {rank}")
            self.exchange.send(offered, rank)
        return call

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write an input of tasks in place of the one before of its kind."""
        for earlier in self.exchange.folder.glob(f"{name.partition('-')[0]}*.safetensors"):
            remove(earlier)
        path = self.exchange.folder / f"{name}.safetensors"
        save_tensors(path, tensors)
        seal(path)
        return path

    def _is_done(self, call: _Call, expert: int) -> bool:
        return call.owners[expert] > 0 and self.board.has(call.key(expert))

    def _take_finished(self, call: _Call) -> None:
        """Take what workers send by now: what they have finished is not lost with them."""
        for rank in self.exchange.remote:
            for expert in (expert for expert, owner in call.owners.items() if owner == rank):
                if expert not in call.taken:
                    if not self._is_done(call, expert):
                        break  # a worker sends in the order of its experts
                    self._take(call, expert)

    def _take(self, call: _Call, expert: int) -> Path:
        """Wait until a worker has done an expert; the file of the result."""
        rank = call.owners[expert]
        if expert not in call.taken:
            done = self.board.take(call.key(expert), [rank], f"{call.title}, expert {expert} of rank {rank}")
            if rank in self.exchange.remote:
                self.exchange.receive(done["files"], rank)
            for file in done["files"]:
                until_visible(self.exchange.absolute(file["name"]))
            call.taken[expert] = self.exchange.absolute(done["result"])
        return call.taken[expert]
