"""Whether the small files of a quantized folder speak of the shards that are in it, and of one conversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import Fields, read_object
from dbrx_quant.runtime.folder.sizes import linear_bits, stored_bits

_CLOSE = 1e-4  # bits per weight that are the same figure, rounded
_SHOWN = 3  # faults of linears


def disagreements(
    folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint, architecture: Architecture
) -> list[str]:
    """What the files that a conversion leaves beside the shards say otherwise than these, a line for each.

    Compared are targets, bits per weight, the width of the head, each linear's bits and shape; files that are
    not there say nothing.

    Args:
        folder: of this program.
        config: its `config.json`.
        checkpoint: its shards, complete.
        architecture: of the model.
    """
    said, found = config.get("quantization_config"), list[str]()
    targets = {"config.json": said.get("bits")} if isinstance(said, dict) else {}
    heads = {"config.json": said.get("head_bits")} if isinstance(said, dict) else {}
    bits = {spec.name: linear_bits(checkpoint, spec) for spec in architecture.linears()}
    bpw = stored_bits(checkpoint, architecture).bpw
    try:
        if strategy := _fields(folder, "strategy.json"):
            targets["strategy.json"] = strategy.number("target_bpw")
            found += _other_bpw("strategy.json: bpw", strategy.number("bpw"), bpw)
            planned = {name: linear.integer("bits") for name, linear in strategy.objects("linears")}
            found += _other_linears("strategy.json", "bits", planned, bits)
        if record := _fields(folder, "conversion.json"):
            settings = record.object("settings")
            targets["conversion.json"] = settings.number("bpw")
            heads["conversion.json"] = settings.integer("head_bits")
            unknown = sorted(record.object("relative_errors").values.keys() - bits.keys())
            found += [f"conversion.json: {name} is no linear of this model" for name in unknown[:_SHOWN]]
        if measurement := _fields(folder, "measurement.json"):
            shapes = {spec.name: list(spec.shape) for spec in architecture.linears()}
            measured = {name: linear.items("shape") for name, linear in measurement.objects("linears")}
            found += _other_linears("measurement.json", "shape", measured, shapes)
        if evaluation := _fields(folder, "evaluation.json"):
            for entry in evaluation.listed("evaluations"):
                found += _other_bpw(f"evaluation.json: {entry.place}bpw", entry.number("bpw"), bpw)
    except CheckpointError as error:
        found.append(str(error))
    for what, values in (("bits per weight asked for", targets), ("bits of the head", heads)):
        if any(value != other for value in values.values() for other in values.values()):
            each = ", ".join(f"{name} says {value}" for name, value in values.items())
            found.append(f"{what}: {each}: they are of different conversions; convert again")
    return found


def _fields(folder: Path, name: str) -> Fields | None:
    remedy = "convert again"
    try:
        return Fields(folder / name, read_object(folder / name, "one of our files", remedy), remedy)
    except FileNotFoundError:
        return None


def _other_bpw(what: str, said: float, stored: float) -> list[str]:
    if abs(said - stored) <= _CLOSE:
        return []
    return [f"{what} is {said}, the shards hold {stored:.5f} bits per weight: it is of another conversion"]


def _other_linears(file: str, what: str, said: Mapping[str, Any], true: Mapping[str, Any]) -> list[str]:
    """Linears of which a file says something else than is true, the first few."""
    wrong = [name for name in sorted(said.keys() | true.keys()) if said.get(name) != true.get(name)]
    lines = [
        f"{file}: {what} of {name} is {said.get(name, 'missing')}, the model has {true.get(name, 'none')}"
        for name in wrong[:_SHOWN]
    ]
    if len(wrong) > _SHOWN:
        lines.append(f"{file}: {what} of {len(wrong)} linears in all is not that of the model")
    return lines
