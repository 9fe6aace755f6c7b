"""Hidden states on disk: 16 bits a value and a power of two a token, written once and mapped by readers.

A token's values are float16 after division by a power of two that puts the largest between 2^14 and 2^15, so
that each keeps 11 bits down to 2^-29 of the largest: the outlier channels of a residual stream take nothing
from the others. A file is a safetensors file with `halves` [..., D] and `exponents` [...] int8; its checksum
is beside it (`runtime/files/sealed.py`), compared when it is opened.
"""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbrx_quant.runtime.files.atomic import naming, save_tensors, temporary_beside
from dbrx_quant.runtime.files.sealed import check_seal, seal
from dbrx_quant.runtime.kernels.device import CPU, upload

_LARGEST = 15  # the largest value of a token is below 2 to this
_MOST = 126  # of an exponent: a float32 holds 2 to this and its inverse exactly
_VALUES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class States:
    """States in 16 bits, read and written as float32.

    Attributes:
        halves: [..., D] float16.
        exponents: [...] int8; a value is its half times 2 to this.
        device: where they are read to; what is on the host are halves and exponents.
    """

    halves: Tensor
    exponents: Tensor
    device: torch.device = CPU

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"halves": self.halves, "exponents": self.exponents}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "States":
        """States of such tensors, read to the host; others may be among them."""
        return States(tensors["halves"], tensors["exponents"])

    @property
    def shape(self) -> torch.Size:
        """[..., D]."""
        return self.halves.shape

    @property
    def flat(self) -> "States":
        """The same with all axes but the last one made one."""
        return States(self.halves.view(-1, self.shape[-1]), self.exponents.view(-1), self.device)

    def part(self, rows: slice) -> "States":
        """Some of them along the first axis, not read yet."""
        return States(self.halves[rows], self.exponents[rows], self.device)

    def __len__(self) -> int:
        return len(self.halves)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Those along the first axis, as float32."""
        halves, exponents = (
            upload(self.halves[index], self.device),
            upload(self.exponents[index], self.device),
        )
        return halves.float() * _power(exponents)

    def __setitem__(self, index: slice, states: Tensor) -> None:
        largest = states.abs().amax(-1)
        exponents = torch.frexp(largest).exponent - _LARGEST  # 0 where the largest is 0 or not finite
        exponents = exponents.where(largest.isfinite() & (largest > 0), 0).clamp(-_MOST, _MOST)
        self.halves[index] = (states * _power(-exponents)).half()
        self.exponents[index] = exponents.to(torch.int8)

    @staticmethod
    def scratch(folder: Path, shape: Sequence[int]) -> "States":
        """Room for states that no other process will read, as in `scratch`."""
        return States(scratch(folder, shape, torch.float16), torch.zeros(tuple(shape)[:-1], dtype=torch.int8))


def _power(exponents: Tensor) -> Tensor:
    """[..., 1] float32, 2 to the power of each, put together from its bits."""
    return ((exponents.int() + 127) << 23).view(torch.float32)[..., None]


def scratch(folder: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in a file that has no name, and is gone when they are.

    Raises:
        OSError: the disk has no room for it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder / "scratch")
    with naming(folder, temporary, size), temporary.open("x+b") as file:
        temporary.unlink()
        # Without the room, a write to the mapped file would kill the process instead of raising.
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


@contextmanager
def new_states(path: Path, shape: Sequence[int]) -> Iterator[Tensor]:
    """Float32 zeros to be filled inside the `with` block; only when that succeeds are they written to `path`.

    Raises:
        OSError: the disk has no room for it.
    """
    states = scratch(path.parent, shape)
    yield states
    coded = States.scratch(path.parent, shape)
    step = max(1, _VALUES_AT_ONCE // max(1, states[:1].numel()))
    for start in range(0, len(states), step):
        coded[start : start + step] = states[start : start + step]
    save_tensors(path, coded.tensors)
    seal(path)


def open_states(path: Path, device: torch.device = CPU) -> States:
    """The states in a file, to be read to a device.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not as it was written.
    """
    check_seal(path)
    stored = load_file(path)
    return States(stored["halves"], stored["exponents"], device)
