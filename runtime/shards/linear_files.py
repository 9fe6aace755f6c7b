"""Finished linears of a work folder, one file each: written once, and read back dequantized.

Each has its checksum beside it, compared when it is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_quant.runtime.exl2.format import padded_columns
from dbrx_quant.runtime.families.facts import LinearSpec, to_half
from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.sealed import check_seal, seal
from dbrx_quant.runtime.kernels.ops import dequantize


class LinearFiles:
    """The files of a folder.

    Args:
        folder: where they are; made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of a linear."""
        return self.folder / f"{name}.safetensors"

    def unfinished(self, specs: Sequence[LinearSpec]) -> list[LinearSpec]:
        """The given linears that have no file yet."""
        return [spec for spec in specs if not self.path(spec.name).exists()]

    def write(
        self, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None, facts: Mapping[str, str]
    ) -> None:
        """Write the file of a linear, atomically.

        Args:
            spec: the linear.
            tensors: as stored, by suffix.
            bias: [N], if it has one.
            facts: for the file's metadata.

        Raises:
            CheckpointError: the bias does not fit into half precision.
        """
        named = {f"{spec.name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        if bias is not None:
            padded = torch.zeros(padded_columns(spec.shape[1]), dtype=torch.float16)
            padded[: spec.shape[1]] = to_half(bias, f"{spec.name}.bias")
            named[f"{spec.name}.bias"] = padded
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(spec.name), named, facts)
        seal(self.path(spec.name))

    def check(self, specs: Iterable[LinearSpec]) -> None:
        """Raise CheckpointError unless the files of all these linears are as they were written."""
        for spec in specs:
            check_seal(self.path(spec.name))

    def stored(self, spec: LinearSpec) -> dict[str, Tensor]:
        """The tensors of a linear as stored, by suffix.

        Raises:
            CheckpointError: its file is not as it was written.
        """
        self.check([spec])
        prefix = f"{spec.name}."
        return {name.removeprefix(prefix): t for name, t in load_file(self.path(spec.name)).items()}

    def weight(self, spec: LinearSpec) -> Tensor:
        """The dequantized float32 weight [N, K] of a linear."""
        return dequantize(self.stored(spec), spec.shape[1]).float().contiguous()
