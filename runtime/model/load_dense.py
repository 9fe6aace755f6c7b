"""The original of a quantized model, loaded whole for comparison."""

import os
from typing import Any

import torch

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.config import read_config
from dbrx_quant.runtime.families.facts import WRAPPERS
from dbrx_quant.runtime.families.source import open_source
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
    source = open_source(folder)
    checkpoint = source.checkpoint
    state = family_of(source.architecture.family).dense_state(source.architecture, checkpoint)
    if state is None:
        state = {_unwrapped(checkpoint.info(name).name): checkpoint.load(name) for name in checkpoint.names()}
    options |= {"config": source.config, "dtype": dtype, "output_loading_info": True, "state_dict": state}
    try:
        model, info = getattr(transformers, source.config.architectures[0]).from_pretrained(None, **options)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            found = sorted(map(str, info[problem]))
            raise CheckpointError(f"{folder}: {len(found)} {problem.replace('_', ' ')}, {found[0]} first")
    return model


def _unwrapped(name: str) -> str:
    """A stored name as transformers knows it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
