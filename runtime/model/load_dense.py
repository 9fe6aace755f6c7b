"""The original of a quantized model, loaded whole for comparison."""

import os
from typing import Any

import torch

from dbrx_quant.runtime.families import describe, family_of
from dbrx_quant.runtime.families.config import load_config, read_config
from dbrx_quant.runtime.families.facts import check_dense_source
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.find import find_folder


def load_dense(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The original, unquantized model of a folder, its configuration fixed as by `load_config`.

    Takes every naming that the converter takes, also those that transformers does not.

    Args:
        folder: a model folder as from the Hub.
        dtype: to load it in.
        **options: passed on to `from_pretrained`.

    Raises:
        CheckpointError: it is quantized, or a tensor of the model is missing, superfluous or misshapen.
    """
    import transformers

    folder = find_folder(folder, None)
    if "quantization_config" in read_config(folder):
        raise CheckpointError(f"{folder}: is quantized; use load_model for it, this loads the original")
    config = load_config(folder)
    architecture = describe(config)
    checkpoint = architecture.open(folder)
    check_dense_source(architecture, checkpoint)
    options |= {"config": config, "dtype": dtype, "output_loading_info": True}
    state = family_of(architecture.family).dense_state(architecture, checkpoint)
    if state is None:
        where = str(folder)
        options |= {"local_files_only": True, "use_safetensors": True}  # else it may be pickled weights
    else:
        where, options["state_dict"] = None, state
    try:
        model, info = getattr(transformers, config.architectures[0]).from_pretrained(where, **options)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            found = sorted(map(str, info[problem]))
            raise CheckpointError(f"{folder}: {len(found)} {problem.replace('_', ' ')}, {found[0]} first")
    return model
