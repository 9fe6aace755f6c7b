"""Tensors of PyTorch's `.bin` files, read by torch's restricted unpickler, which runs no code."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.runtime.files.errors import CheckpointError

_WAY_OUT = (
    "save the model as safetensors: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')"
    ".save_pretrained(OTHER)"
)


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file by name, as views of the mapped file.

    Raises:
        CheckpointError: it holds something else, or is older than torch 1.6 and cannot be mapped.
    """
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"{file}: not readable as tensors alone ({reason}); {_WAY_OUT}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{file}: holds more than named tensors; {_WAY_OUT}")
    return {str(name): tensor.detach() for name, tensor in found.items()}
