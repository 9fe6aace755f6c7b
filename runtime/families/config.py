"""A model's configuration as transformers reads it, with what it misreads corrected."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.plausible import check_counts
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_text import load_json
from dbrx_quant.runtime.files.regular import check_model_folder


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json` of a model folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object; or the folder holds what is no regular file
            but would be opened as one.
    """
    path = Path(folder) / "config.json"
    check_model_folder(Path(folder))
    try:
        config = load_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model folder has a config.json") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def load_config(folder: Path, corrections: Mapping[str, Any] | None = None) -> Any:
    """The transformers configuration of a model folder, ready to build the model from.

    What transformers misreads of a family's configurations is put right.

    Code that the folder brings or names is not run: no class of an `auto_map`, and no attention kernel, which
    transformers would fetch from the Hub.

    Args:
        folder: of the model.
        corrections: keys of its `config.json` that have other values in truth.

    Raises:
        CheckpointError: there is no `config.json`, it names sizes that the shards cannot have, or
            transformers does not know its architecture.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw, path = read_config(folder), Path(folder) / "config.json"
    check_counts(raw, Path(folder))  # transformers loops over the layers
    try:
        if corrections:
            config = CONFIG_MAPPING[raw["model_type"]].from_dict({**raw, **corrections})
        else:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        config._attn_implementation, config.return_dict = None, True
        fix = family_of(config.model_type).fix_config
        if fix is not None:
            fix(config, raw, False)
    except MemoryError:
        raise
    except Exception as error:  # transformers' classes raise what they will on mistyped fields
        raise CheckpointError(f"{path}: {error or repr(error)}") from None
    return config
