"""What the report shows, as one JSON-ready object, gathered from the small files of a quantized folder.

    config.json, strategy.json, measurement.json, conversion.json, evaluation.json and the shards' headers

Folders of other converters have only the first and the last; what cannot be known is null or empty then.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.text.sources import FILE_TYPES
from dbrx_quant.quantize.budget.frontier import FrontierPoint, frontier, rescaled
from dbrx_quant.quantize.budget.strategy import Outcome, Strategy, find_strategy
from dbrx_quant.quantize.measurement import Measurement, find_measurement
from dbrx_quant.quantize.output.record import Record, read_record
from dbrx_quant.runtime.evaluation.record import read_evaluations
from dbrx_quant.runtime.exl2.group_text import render_groups
from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.facts import ATTENTION_ROLES
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.inspect import FolderFacts, LinearFacts, inspect_folder

REPORT_VERSION = 1

HEAD_KIND = "head"
HELD_OUT = "held-out calibration rows"  # what the conversion measured itself on, unless it was given a text
ATTENTION = "attention"  # the kind of the linears with these roles; others are called by their own names

_SIZE_NAME = re.compile(r"[\d.]+bpw")
_FILE_SUFFIXES = (".safetensors", ".gz", *FILE_TYPES)  # of calibration files; datasets have none
_STEP = 0.1  # bits between the points of the curve
_LEAST_END = 5.0  # where the curve ends at the earliest, bits

Report = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The small files of one quantized folder.

    Attributes:
        name: what to call it.
        facts: from its shards' headers.
        quantization: what `config.json` says of the quantization.
        strategy: `strategy.json`, None where there is none of ours; likewise the next three.
        outcome: what became of it, from the same file.
        measurement: `measurement.json`.
        record: `conversion.json`.
        evaluations: the entries of `evaluation.json`.
    """

    name: str
    facts: FolderFacts
    quantization: Mapping[str, Any]
    strategy: Strategy | None = None
    outcome: Outcome | None = None
    measurement: Measurement | None = None
    record: Record | None = None
    evaluations: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def read_folder(folder: Path, name: str | None = None) -> Folder:
    """Read the small files of a quantized folder; `name` is what to call it if not by its own name.

    Raises:
        CheckpointError: it is no EXL2 checkpoint, or one of the files is damaged.
    """
    strategy, outcome = find_strategy(folder) or (None, None)
    return Folder(
        name=name or _folder_name(folder.resolve()),
        facts=inspect_folder(folder),
        quantization=_quantization(folder),
        strategy=strategy,
        outcome=outcome,
        measurement=find_measurement(folder),
        record=read_record(folder),
        evaluations=read_evaluations(folder),
    )


def _quantization(folder: Path) -> dict[str, Any]:
    """The section of config.json, the parts of it that the report counts with checked."""
    found = read_config(folder).get("quantization_config") or {}
    sound = (
        isinstance(found, dict)
        and isinstance(found.get("calibration") or {}, dict)
        and type(found.get("head_bits", 6)) is int
    )
    if not sound:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config must be an object, with a whole number "
            "as head_bits and an object as calibration, if any"
        )
    return found


def gather(folder: Folder) -> Report:
    """All that the report says about one folder.

    Returns:
        `name`, `model`, `headline`, `linears` {`columns`, `rows`}, `errors` (what the linears' errors are:
        "measured", "predicted" or null), `coverage` block → tokens of each expert, `curve` [[bpw, KL]],
        `bits_bought` (per step of the curve), `block_kl`, `evaluations`, `calibration`, `command`,
        `settings`, `versions`, `notes`.
    """
    facts, strategy, outcome, record = folder.facts, folder.strategy, folder.outcome, folder.record
    quantization = folder.quantization
    held_out = None
    if outcome is not None and outcome.measured:
        held_out = {**outcome.measured, "text": outcome.held_out or HELD_OUT}
    rows, errors = _linears(folder)
    points = _frontier(folder)
    if strategy is not None and strategy.kl and all(point.kl > 0 for point in points):
        known = [(facts.bpw, strategy.kl)]
        moved = rescaled([(point.bpw, point.kl) for point in points], known)
        points = [replace(point, kl=kl) for point, (_, kl) in zip(points, moved, strict=True)]
    return {
        "format_version": REPORT_VERSION,
        "name": folder.name,
        "model": {
            "name": record.settings.get("model") if record else None,
            "family": facts.family,
            "blocks": len(facts.blocks),
            "experts": len({linear.expert for linear in facts.decoder if linear.expert is not None}),
            "weights": sum(linear.weights for linear in facts.decoder),
            "producer": str(quantization.get("version", "unknown")),
        },
        "headline": {
            "target_bpw": strategy.target_bpw if strategy else None,
            "bpw": facts.bpw,
            "head_bpw": facts.head_bpw,
            "total_bytes": facts.total_bytes,
            "predicted_kl": strategy.kl if strategy else None,
            "held_out": held_out,
        },
        "linears": {"columns": list(LINEAR_COLUMNS), "rows": rows},
        "errors": errors,
        "coverage": {
            str(block): [expert.tokens for expert in experts]
            for block, experts in (folder.measurement.coverage if folder.measurement else {}).items()
        },
        "curve": [[point.bpw, point.kl] for point in points],
        "bits_bought": _bits_bought(points),
        "block_kl": _block_kl(facts, strategy),
        "evaluations": list(folder.evaluations),
        "calibration": _calibration(folder.measurement, quantization),
        "command": record.command if record else None,
        "settings": dict(record.settings) if record else {},
        "versions": dict(record.versions) if record else {},
        "notes": list(outcome.notes) if outcome else [],
    }


LINEAR_COLUMNS = ("name", "block", "expert", "kind", "bpw", "error", "nats", "tokens", "groups")
NAME, BLOCK, EXPERT, KIND, BPW, ERROR, NATS, TOKENS, GROUPS = range(len(LINEAR_COLUMNS))


def compare(reports: Sequence[Report]) -> Report:
    """Several reports, and for each after the first how many more bits it gives to what."""
    return {
        "format_version": REPORT_VERSION,
        "reports": list(reports),
        "differences": [_difference(reports[0], other) for other in reports[1:]],
    }


def label(report: Report) -> str:
    """A checkpoint's name for people: model and size, as far as they are known."""
    model = report["model"]["name"]
    if not model:
        return str(report["name"])
    return f"{str(model).rpartition('/')[2]} {report['headline']['bpw']:.2f} bpw"


def measured_kl(report: Report) -> tuple[float, str] | None:
    """The measured KL to show first and what on: the evaluation of the most tokens, else held-out rows."""
    if report["evaluations"]:
        entry = max(report["evaluations"], key=lambda entry: entry["tokens"])
        return entry["kl"], entry["text"]
    held_out = report["headline"]["held_out"]
    return (held_out["kl"], held_out["text"]) if held_out else None


def kinds(report: Report) -> list[str]:
    """The kinds of the decoder's linears that the bars tell apart, attention first."""
    found = dict.fromkeys(kind for block in report["block_kl"] for kind in block["kl"])
    found |= dict.fromkeys(kind for step in report["bits_bought"] for kind in step["bits"])
    return sorted(found, key=lambda kind: kind != ATTENTION)


def _linears(folder: Folder) -> tuple[list[list[Any]], str | None]:
    """Rows of LINEAR_COLUMNS in the order of the data, and what their errors are."""
    chosen = folder.strategy.choices if folder.strategy else {}
    measured = folder.measurement.linears if folder.measurement else {}
    recorded = folder.record.relative_errors if folder.record else {}
    rows, predicted = [], False
    for linear in folder.facts.linears:
        nats = chosen[linear.name].error if linear.name in chosen else None
        entry = measured.get(linear.name)
        error = recorded.get(linear.name)
        if not recorded and nats is not None and entry and entry.energy > 0:
            error, predicted = float(f"{nats / entry.energy:.4g}"), True
        rows.append(
            [
                linear.name,
                linear.block,
                linear.expert,
                _own_name(linear.name),
                round(linear.bpw, 4),
                error,
                nats,
                entry.tokens if entry else None,
                render_groups(linear.groups) if linear.groups else "16-bit",
            ]
        )
    return rows, "measured" if recorded else "predicted" if predicted else None


def _folder_name(folder: Path) -> str:
    """`3.0bpw` alone tells little: with its parent's name it tells the model."""
    return f"{folder.parent.name}/{folder.name}" if _SIZE_NAME.fullmatch(folder.name) else folder.name


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]


def _kind(linear: LinearFacts) -> str:
    if linear.block is None:
        return HEAD_KIND
    if linear.role in ATTENTION_ROLES:
        return ATTENTION
    own = _own_name(linear.name).removesuffix("_proj")
    return f"shared {own}" if linear.role.startswith("shared_") else own


def _frontier(folder: Folder) -> list[FrontierPoint]:
    """The curve at every tenth of a bit, from the least possible to well beyond this folder's size."""
    if not folder.measurement:
        return []
    linears, found = folder.measurement.linears, {linear.name for linear in folder.facts.linears}
    if linears.keys() != found:
        missing = sorted(linears.keys() ^ found)
        raise CheckpointError(f"measurement.json: made from another model than the shards: {missing[0]}")
    bpw = folder.facts.bpw
    last = max(_LEAST_END, bpw + 1)
    targets = [round(2 + _STEP * i, 1) for i in range(round((last - 2) / _STEP) + 1)]
    kind_of = {linear.name: _kind(linear) for linear in folder.facts.decoder}
    points = frontier(
        folder.measurement, folder.quantization.get("head_bits", 6), targets, kind_of.__getitem__
    )
    return [
        point for at, point in enumerate(points) if at + 1 == len(points) or points[at + 1].bpw > point.bpw
    ]


def _bits_bought(points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """What each step of the curve costs and gains: KL before and after it, and the added bits by kind."""
    steps, kept = [], list(points[:1])
    for point in points[1:]:  # the least possible size lies between tenths of a bit
        if point.bpw - kept[-1].bpw > _STEP / 2:
            kept.append(point)
    for before, after in pairwise(kept):
        added = {kind: after.bits[kind] - before.bits[kind] for kind in after.bits}
        steps.append(
            {
                "from_bpw": before.bpw,
                "to_bpw": after.bpw,
                "from_kl": before.kl,
                "to_kl": after.kl,
                "bits": {kind: bits for kind, bits in added.items() if bits},
            }
        )
    return steps


def _block_kl(facts: FolderFacts, strategy: Strategy | None) -> list[dict[str, Any]]:
    """Predicted nats of each block by kind, and of the head, whose block is null."""
    chosen = strategy.choices if strategy else {}
    sums: dict[int | None, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for linear in facts.linears:
        if linear.name in chosen:
            sums[linear.block][_kind(linear)].append(chosen[linear.name].error)
    return [
        {"block": block, "kl": {kind: math.fsum(errors) for kind, errors in by_kind.items()}}
        for block, by_kind in sums.items()
    ]


def _calibration(measurement: Measurement | None, quantization: Mapping[str, Any]) -> dict[str, Any]:
    described = {
        **(quantization.get("calibration") or {}),
        **(measurement.calibration if measurement else {}),
    }
    source = str(described.get("source", described.get("dataset", "unknown")))
    return {
        "source": Path(source).name if source.lower().endswith(_FILE_SUFFIXES) else source,
        "rows": described.get("rows"),
        "length": described.get("length"),
        "seed": described.get("seed"),
        "tokens": measurement.tokens if measurement else None,
    }


def _difference(first: Report, other: Report) -> dict[str, Any]:
    """Bits per weight that `other` gives more than `first`, linear by linear; null for another model."""
    rows, others = first["linears"]["rows"], other["linears"]["rows"]
    same = [row[NAME] for row in rows] == [row[NAME] for row in others]
    return {
        "from": first["name"],
        "to": other["name"],
        "bpw": [round(b[BPW] - a[BPW], 4) for a, b in zip(rows, others, strict=True)] if same else None,
    }
