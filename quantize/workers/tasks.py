"""Tasks in messages: what rank 0 describes, and the same task made of it by another worker."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dbrx_quant.calibration.blocks.crew import Signals, Task
from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.shares import DenseShares, Missing
from dbrx_quant.calibration.blocks.states import States, open_states
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage
from dbrx_quant.quantize.budget.expert import MeasuredExperts, effective_tokens
from dbrx_quant.quantize.budget.measure import Measurer
from dbrx_quant.quantize.solve.expert import SolvedExperts
from dbrx_quant.quantize.solve.linear import Solver
from dbrx_quant.quantize.solve.repair import NO_REPAIR, Repair
from dbrx_quant.quantize.solve.stage import StageSolver
from dbrx_quant.runtime.files.sealed import check_seal
from dbrx_quant.runtime.shards.linear_files import LinearFiles


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a sealed file.

    Raises:
        CheckpointError: it is not as it was written.
    """
    check_seal(path)
    return load_file(path)


def task_of(
    call: Mapping[str, Any],
    routing: Routing,
    tensors: Mapping[str, Tensor],
    paths: Mapping[str, Path],
    model: StreamedModel,
    folder: Path,
    signals: Signals,
    shares: dict[int, States],
) -> Task:
    """The task that a call describes.

    Args:
        call: its kind, block and facts.
        routing: of all tokens.
        tensors: that it names.
        paths: that it names.
        model: the source.
        folder: for files while it runs.
        signals: from other workers.
        shares: what this worker has made of the block's unquantized experts, by their numbers.
    """
    kind, block, facts = call["kind"], call["block"], call["facts"]
    experts = model.architecture.blocks[block].experts
    assert experts is not None
    if kind == DenseShares.KIND:
        return DenseShares(model, block, routing, facts["tokens"], folder)
    if kind == MeasuredExperts.KIND:
        measurer = Measurer(paths["entries"], facts["effort"], facts["scale"])
        upstream, length, seen = (
            open_states(paths["upstream"], model.device).flat,
            facts["length"],
            facts["seen"],
        )
        tokens = effective_tokens(routing.part(slice(seen)), experts, length)
        return MeasuredExperts(
            model,
            block,
            experts,
            routing,
            length,
            seen,
            tokens,
            upstream,
            paths["upstream"],
            measurer,
            folder,
            signals,
        )
    if kind == SolvedExperts.KIND:
        shrinkage = {name: Shrinkage(**fields) for name, fields in facts["shrinkage"].items()}
        files, effort, refit = LinearFiles(paths["linears"]), facts["effort"], facts["refit"]
        solver = Solver(files, facts["groups"], shrinkage.__getitem__, effort, refit)
        missing, repair = None, Repair(facts["ridge"]) if facts["compared"] else NO_REPAIR
        if facts["compared"]:
            missing = Missing(States.of(tensors), tensors["squares"], shares)
        stages = StageSolver(model, solver, repair)
        return SolvedExperts(stages, block, experts, routing, facts["length"], facts["seen"], missing, folder)
    raise ValueError(f"{kind}: no task that workers know; all must run the same version")
