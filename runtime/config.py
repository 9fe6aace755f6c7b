"""A model's configuration as transformers reads it, with what it misreads put right."""

import json
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.errors import CheckpointError


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json` of a model folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model folder has a config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def load_config(folder: Path) -> Any:
    """The transformers configuration of a model folder, ready to build the model from.

    DBRX as on the Hub keeps its RoPE base inside `attn_config`, where transformers 5 does not look: it would
    run with base 10000 instead of 500000. Here the nested value counts when there is no other.

    Code that the folder brings or names is not run: no class of an `auto_map`, and no attention kernel, which
    transformers would fetch from the Hub.

    Raises:
        CheckpointError: there is no `config.json`, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    raw = read_config(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, AttributeError, TypeError, IndexError) as error:  # mistyped fields
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from None
    config._attn_implementation = None
    repair_rope(config, raw)
    return config


def repair_rope(config: Any, raw: dict[str, Any]) -> None:
    """Set DBRX's RoPE base from `attn_config`, unless the top level names one itself.

    A `rope_parameters` at the top level does not count: transformers 5 writes its default of 10000 there when
    it loads and saves a DBRX, while the base that the model was trained with stays in `attn_config`.
    """
    if config.model_type != "dbrx" or "rope_theta" in raw:
        return
    theta = (raw.get("attn_config") or {}).get("rope_theta")
    if theta:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
