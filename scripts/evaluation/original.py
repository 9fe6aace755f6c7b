"""The original of an evaluation: taken through the text a block at a time, or what a cache kept of it."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_quant.runtime.output.progress import counter
from dbrx_quant.scripts.terminal.output import bytes_text, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dbrx_quant.quantize.estimate.evaluation import EvaluationNeeds
    from dbrx_quant.runtime.families.facts import Architecture


def original_of(arguments: argparse.Namespace, rows: "Tensor", folder: Path) -> Any:
    """The original's outputs on windows [N, L], as `evaluate` takes them.

    Args:
        arguments: of `eval`.
        rows: the windows.
        folder: of the quantized model.

    Raises:
        ValueError: the models do not belong together, or memory or disk are too small.
        CheckpointError: the original cannot be read, or the cache is of another one.
    """
    from dbrx_quant.calibration.blocks.original import KeptStates, predict
    from dbrx_quant.runtime.evaluation.scores import ReferenceCache, cache_reference, missing_windows

    if not arguments.reference:
        return ReferenceCache(arguments.cache)
    model = _open(arguments, folder)
    if not arguments.cache:
        scratch = Path(tempfile.gettempdir())
        _check(arguments, model, len(rows), scratch)
        with counter("original", "step", arguments.quiet) as progress:
            return predict(model, rows, scratch, progress=progress)
    name = _fingerprint(model.folder)
    missing = missing_windows(rows, arguments.cache, original=name)
    if not missing:
        return ReferenceCache(arguments.cache)
    _check(arguments, model, len(missing), arguments.cache)
    kept = KeptStates(arguments.cache, name)
    with counter("original", "step", arguments.quiet) as progress:
        predictions = predict(model, rows[missing], arguments.cache, kept, progress)
    with counter("original's logits", "window", arguments.quiet) as progress:
        cache = cache_reference(predictions, rows, arguments.cache, progress=progress, original=name)
    kept.discard()
    return cache


def first_device(arguments: argparse.Namespace) -> "torch.device":
    """Where the original runs: on the first of the devices that the quantized model goes to, tried out."""
    from dbrx_quant.runtime.kernels.device import find_device
    from dbrx_quant.runtime.model.placement import find_devices

    return find_device(str(find_devices(arguments.device)[0]))


def _open(arguments: argparse.Namespace, folder: Path) -> Any:
    """The original, opened; refused if it is not that of the quantized model."""
    from dbrx_quant.calibration.blocks.model import StreamedModel
    from dbrx_quant.runtime.families import describe
    from dbrx_quant.runtime.families.config import load_config
    from dbrx_quant.runtime.folder.find import find_folder

    model = StreamedModel(find_folder(arguments.reference, None), first_device(arguments), exact=True)
    ours, theirs = _facts(describe(load_config(folder))), _facts(model.architecture)
    for what, mine in ours.items():
        if mine != theirs[what]:
            raise ValueError(f"{folder}: {what} {mine}, the original's {theirs[what]}: not the same model")
    for note in model.notes:
        say(f"note: {note}")
    return model


def _facts(architecture: "Architecture") -> dict[str, Any]:
    """What a model has in common with its original."""
    return {
        "family": architecture.family,
        "vocabulary": architecture.vocabulary,
        "hidden size": architecture.hidden,
        "number of blocks": len(architecture.blocks),
        "number of experts": [block.experts.count if block.experts else 0 for block in architecture.blocks],
    }


def _check(arguments: argparse.Namespace, model: Any, windows: int, scratch: Path) -> None:
    """Say what it is going to take, and refuse what this machine has no room for."""
    from dbrx_quant.quantize.estimate.evaluation import check_evaluation, evaluation_needs

    cached = arguments.cache is not None
    needs = evaluation_needs(model.architecture, windows, arguments.length, cached)
    if not arguments.quiet:
        say(_text(needs, scratch, windows))
    check_evaluation(needs, model.device, scratch, arguments.cache)


def _text(needs: "EvaluationNeeds", scratch: Path, windows: int) -> str:
    disk = bytes_text(needs.states + needs.kept)
    if needs.cache:
        disk += f" for states and {bytes_text(needs.cache)} for log-probabilities"
    return (
        f"the original goes through {windows} windows a block at a time: about {bytes_text(needs.streaming)} "
        f"of memory and {disk} of disk in {scratch}; comparing takes about {bytes_text(needs.scoring)} of "
        "memory beside the quantized model's mapped weights"
    )


def _fingerprint(folder: Path) -> str:
    """What tells an original from others."""
    import hashlib
    import json

    from dbrx_quant.quantize.measurement import source_facts

    return hashlib.sha256(json.dumps(source_facts(folder), sort_keys=True).encode()).hexdigest()[:32]
