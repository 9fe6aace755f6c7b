"""Any worker but rank 0: does the tasks of its experts as rank 0 calls for them."""

from collections.abc import Mapping
from typing import Any

import torch

from dbrx_quant.calibration.blocks.crew import Result, Task
from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.shares import DenseShares
from dbrx_quant.calibration.blocks.states import States
from dbrx_quant.calibration.blocks.walk import Turn, turns
from dbrx_quant.quantize.workers.board import Board
from dbrx_quant.quantize.workers.exchange import Exchange
from dbrx_quant.quantize.workers.leader import END
from dbrx_quant.quantize.workers.peers import Peers, until_visible
from dbrx_quant.quantize.workers.tasks import load_tensors, task_of
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.sealed import seal


class Helper(Peers):
    """A worker that rank 0 calls.

    Args:
        board: of all workers.
        exchange: of its files.
        model: the source.
    """

    def __init__(self, board: Board, exchange: Exchange, model: StreamedModel) -> None:
        super().__init__(board, exchange)
        self._model = model
        self._shares: dict[int, States] = {}
        self._routing: tuple[str, Routing] | None = None

    def help_out(self) -> None:
        """Do tasks until rank 0 has no more of them.

        Raises:
            ChangedError: the source is not what it was when it was opened.
        """
        call, number = self._next(0), 0
        with torch.no_grad():
            while call["kind"] != END:
                self._do(call, number)
                number += 1
                call = self._next(number)
        self._model.check_unchanged()
        self.board.put(f"left/{self.board.rank}", self.board.waited)

    def _next(self, number: int) -> dict[str, Any]:
        call: dict[str, Any] = self.board.take(f"call/{number}", [0], "the next task of rank 0")
        return call

    def _do(self, call: Mapping[str, Any], number: int) -> None:
        """Do a task for the experts of this worker."""
        title = f"{call['kind']}, block {call['block']}"
        if self._is_remote:
            self.board.note(f"{title}, files of rank 0")
            self.exchange.receive(call["files"], 0)
        paths = {name: self.exchange.absolute(path) for name, path in call["paths"].items()}
        for file in call["files"]:
            until_visible(self.exchange.absolute(file["name"]))
        self._known.update(file["name"] for file in call["files"])
        tensors = load_tensors(paths["tensors"]) if "tensors" in paths else {}
        routing, experts = self._routing_of(call), self._model.architecture.blocks[call["block"]].experts
        assert experts is not None
        scratch = self.exchange.folder
        task = task_of(call, routing, tensors, paths, self._model, scratch, self, self._shares)
        if call["kind"] == DenseShares.KIND:
            self._shares = {}
        for turn in turns(routing, experts):
            if turn.expert in call["experts"] and turn.expert % self.board.size == self.board.rank:
                self.board.note(f"{title}, expert {turn.expert}")
                result = task.do(turn)
                if call["kind"] == DenseShares.KIND:
                    self._shares[turn.expert] = States.of(result)
                self._give(task, turn, result, number)
        self.exchange.finish_sending()
        if self._is_remote:
            self.exchange.clear(keep=paths["routing"])

    @property
    def _is_remote(self) -> bool:
        return self.board.rank in self.exchange.remote

    def _routing_of(self, call: Mapping[str, Any]) -> Routing:
        """The routing of a call, which may be that of the one before."""
        name = call["paths"]["routing"]
        if self._routing is None or self._routing[0] != name:
            self._routing = (
                name,
                Routing(**load_tensors(self.exchange.absolute(name)), device=self._model.device),
            )
        return self._routing[1]

    def _give(self, task: Task, turn: Turn, result: Result, number: int) -> None:
        """Tell rank 0 that an expert is done."""
        path = self.exchange.folder / f"result-{number}-{turn.expert}.safetensors"
        save_tensors(path, result)
        seal(path)
        offered = self.exchange.offer([*task.products(turn), path])
        done = {"files": offered, "result": self.exchange.relative(path)}
        self.board.put(f"done/{number}/{turn.expert}", done)
        if self._is_remote:
            self.exchange.send(offered, 0, wait=False)
