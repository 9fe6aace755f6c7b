"""An original model, opened: its weights, and its configuration as the weights show it to be.

What `config.json` says and the weights contradict is decided by the weights where they leave no doubt (tied
embeddings, biases, rows of the embedding), and said in a note; any other contradiction is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbrx_quant.runtime.exl2.checkpoint import Checkpoint
from dbrx_quant.runtime.families import describe, family_of
from dbrx_quant.runtime.families.config import load_config, read_config
from dbrx_quant.runtime.families.facts import Architecture, check_dense_source, normalised
from dbrx_quant.runtime.families.family import Switch
from dbrx_quant.runtime.files.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Source:
    """An original model.

    Attributes:
        config: transformers' configuration, as the weights show it to be.
        architecture: what it describes.
        checkpoint: the weights, which are those of the architecture and no others.
        corrections: keys of `config.json` that have other values in truth.
        notes: what was corrected, a sentence each.
    """

    config: Any
    architecture: Architecture
    checkpoint: Checkpoint
    corrections: Mapping[str, Any]
    notes: tuple[str, ...]


def open_source(folder: Path) -> Source:
    """The original model in a folder.

    Raises:
        CheckpointError: unknown architecture, tensors that are missing or left over, or a configuration that
            the weights contradict.
    """
    raw = read_config(folder)
    family = family_of(raw.get("model_type"))
    if not family.architectures:
        describe(load_config(folder))  # says what is supported
    checkpoint = open_weights(folder)
    corrections = dict(_corrections(raw, checkpoint, family.switches))
    config = load_config(folder, corrections)
    architecture = describe(config)
    _check_described(architecture, checkpoint)
    check_dense_source(architecture, checkpoint)
    notes = tuple(
        f"config.json: {key} is {_json(raw.get(key))}, by the weights it is {_json(value)}; they are followed"
        for key, value in corrections.items()
    )
    return Source(config, architecture, checkpoint, corrections, notes)


def open_weights(folder: Path) -> Checkpoint:
    """The weights of an original model under normalised names, whatever its configuration says of them."""
    renames = family_of(read_config(folder).get("model_type")).renames
    return Checkpoint(folder, partial(normalised, renames=renames), source=True)


def embedding_rows(folder: Path) -> int | None:
    """Rows of a model's embedding, quantized or not: as stored, without weights as `config.json` says."""
    said = read_config(folder).get("vocab_size")
    try:
        return open_weights(folder).info(EMBEDDING).shape[0]
    except CheckpointError:
        return said if isinstance(said, int) else None


def _corrections(
    raw: Mapping[str, Any], checkpoint: Checkpoint, switches: tuple[Switch, ...]
) -> Iterator[tuple[str, Any]]:
    """The keys of a raw config.json that the weights contradict, with the values that they show."""
    if EMBEDDING in checkpoint:
        rows = checkpoint.info(EMBEDDING).shape[0]
        if "vocab_size" in raw and raw["vocab_size"] != rows:
            yield "vocab_size", rows
        tied = bool(raw.get("tie_word_embeddings", False))
        if tied and HEAD in checkpoint and not _same_rows(checkpoint):
            yield "tie_word_embeddings", False
        if not tied and HEAD not in checkpoint and not checkpoint.is_quantized("lm_head"):
            raise CheckpointError(
                f"{checkpoint.folder}: no weight for lm_head: tie_word_embeddings is not true in config.json "
                f"and no {HEAD} is stored; set it to true if the embedding is the head"
            )
    for switch in switches:
        shown = _is_on(switch, raw, checkpoint)
        if shown != bool(raw.get(switch.key, switch.default)):
            yield switch.key, shown


def _same_rows(checkpoint: Checkpoint) -> bool:
    """Whether head and embedding hold the same values."""
    rows, columns = checkpoint.info(EMBEDDING).shape
    if checkpoint.info(HEAD).shape != (rows, columns):
        return False
    for begin in range(0, rows, _COMPARED_ROWS):
        part = (begin, min(begin + _COMPARED_ROWS, rows))
        if not torch.equal(checkpoint.load(HEAD, part).double(), checkpoint.load(EMBEDDING, part).double()):
            return False
    return True


def _is_on(switch: Switch, raw: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether the linears of a switch have biases.

    Raises:
        CheckpointError: some have one and others do not, which no value of the key describes.
    """
    stems = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith(".weight")]
    concerned = [stem for stem in stems if (found := _LAYER.fullmatch(stem)) and found[2] in switch.parts]
    having = [stem for stem in concerned if f"{stem}.bias" in checkpoint]
    if having and len(having) < len(concerned):
        lacking = next(stem for stem in concerned if stem not in having)
        raise CheckpointError(
            f"{checkpoint.folder}: {switch.key} is {_json(raw.get(switch.key))} in config.json, "
            f"{having[0]}.bias is stored, {lacking}.bias is not; a model has all of them or none"
        )
    return bool(having)


def _check_described(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where sizes in the configuration are not those of the weights."""
    found = [match for name in checkpoint.names() if (match := _LAYER.fullmatch(name))]
    layers = 1 + max((int(match[1]) for match in found), default=-1)
    with_experts = {int(match[1]) for match in found if ".experts." in match[2]}
    claims: list[tuple[str, Any, Any]] = [("layers", len(architecture.blocks), layers)]
    if EMBEDDING in checkpoint:
        claims.append(("channels", architecture.hidden, checkpoint.info(EMBEDDING).shape[-1]))
    described = {block.index for block in architecture.blocks if block.experts}
    claims.append(("layers with experts", sorted(described), sorted(with_experts)))
    for block in architecture.blocks:
        router = block.experts and next(
            f for f in block.floats if f.parameter.startswith(block.experts.router)
        )
        if block.experts and router and router.name in checkpoint:
            rows = checkpoint.info(router.name).shape[0]
            claims.append((f"experts in layer {block.index}", block.experts.count, rows))
    for what, said, stored in claims:
        if said != stored:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json describes {said} {what}, the weights have {stored}; "
                "one of the two belongs to another model"
            )


def _json(value: Any) -> str:
    """A value as JSON has it; a key that is not there as such."""
    return "not there" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
