"""`config.json` and `generation_config.json` of a quantized checkpoint.

The source's config is carried over with what readers stumble on put right:

* What is special about a family is up to its `patch_config`.
* bos, eos and pad ids are filled in; eos is the list of all that ends a text or a chat turn. exllamav2 takes
  the first of the list, everybody else all of them.
* `torch_dtype` stays what it was. The 16-bit tensors are stored as float16 like in every EXL2 checkpoint, but
  the key tells readers which type to compute in, and a model trained in bfloat16 may overflow in float16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.files.atomic import write_json
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.sizes import stored_bits
from dbrx_quant.runtime.folder.verify import PRODUCER
from dbrx_quant.runtime.tokenizer.ids import SpecialIds, read_object, set_ids, special_ids


@dataclass(frozen=True)
class Summary:
    """What the config says about the quantization.

    Attributes:
        bits: the target, bits per weight of the blocks' linears; None: no such target was given.
        bpw: the same figure as reached, counted from the finished shards.
        head_bits: bits of the head, as asked for.
        rows: calibration rows that were used.
        length: tokens of a row.
        dataset: what they were taken from.
        ids: bos, eos and pad.
    """

    bits: float | None
    bpw: float
    head_bits: int
    rows: int
    length: int
    dataset: str
    ids: SpecialIds


def write_configs(
    source: Path,
    out: Path,
    architecture: Architecture,
    *,
    bits: float | None,
    head_bits: int,
    rows: int,
    length: int,
    dataset: str,
    corrections: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write `config.json` and `generation_config.json` and return notes on what was left out of them.

    Args:
        source: the original's folder.
        out: the new checkpoint's folder, shards and tokenizer files already in place: bits are counted from
            the shards, ids read from the tokenizer.
        architecture: what the model consists of.
        bits: as in `Summary`, as are the rest.
        head_bits: see there.
        rows: see there.
        length: see there.
        dataset: see there.
        corrections: keys of the source's config.json that have other values in truth.

    Raises:
        CheckpointError: a file is missing or damaged, or the source is quantized already.
    """
    ids = special_ids(out, source, architecture.vocabulary)
    bpw = stored_bits(architecture.open(out), architecture).bpw
    summary = Summary(bits, bpw, head_bits, rows, length, dataset, ids)
    write_json(out / "config.json", patched_config({**read_config(source), **(corrections or {})}, summary))
    generation = generation_config(read_object(source / "generation_config.json"), ids)
    write_json(out / "generation_config.json", generation)
    return list(ids.notes)


def patched_config(source_config: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    """The quantized checkpoint's `config.json`.

    `quantization_config` has exllamav2's keys: `quant_method`, `version`, `bits` (the target, as exllamav2
    writes it, or what was reached where no such target was given), `head_bits`, `calibration`; and `bpw`, the
    figure reached.

    Args:
        source_config: the raw JSON of the original's config.
        summary: the facts to write into it.

    Raises:
        CheckpointError: the source is quantized already, or names no single architecture.
    """
    if source_config.get("quantization_config"):
        method = source_config["quantization_config"].get("quant_method")
        raise CheckpointError(f"config.json: the source is quantized already ({method}); give the original")
    config = dict(source_config)
    config["architectures"] = [_architecture(source_config)]
    config.pop("auto_map", None)  # remote code stays behind; transformers knows these models
    config.pop("_name_or_path", None)  # the path of another machine
    config = family_of(config.get("model_type")).patch_config(config)
    set_ids(config, summary.ids)
    bpw = round(summary.bpw, 5)
    config["quantization_config"] = {
        "quant_method": "exl2",
        "version": f"{PRODUCER} {version('dbrx-quant')}",
        "bits": bpw if summary.bits is None else float(summary.bits),
        "bpw": bpw,
        "head_bits": summary.head_bits,
        "calibration": {"rows": summary.rows, "length": summary.length, "dataset": summary.dataset},
    }
    return config


def generation_config(source: Mapping[str, Any], ids: SpecialIds) -> dict[str, Any]:
    """The source's `generation_config.json` (an empty mapping if it has none) with complete ids."""
    config = {key: value for key, value in source.items() if key != "_from_model_config"}
    set_ids(config, ids)
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    """The one architecture's name: exllamav2 expects a list of exactly one."""
    names = [str(name) for name in config.get("architectures") or []]
    if len(names) > 1:
        names = [name for name in names if name.endswith("ForCausalLM")]
    if len(names) != 1:
        raise CheckpointError(
            f"config.json: architectures is {config.get('architectures')}; "
            "expected one that ends in ForCausalLM"
        )
    return names[0]
