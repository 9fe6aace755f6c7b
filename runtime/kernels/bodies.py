"""Bodies of repacked linears that are there already, in a file's mapping or a copy of it: whose they are.

A body belongs to the very tensors that it was made of, as long as they live and nobody writes to them: then
`repacked.py` takes it instead of making one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.kernels.memo import remember, version_sum


@dataclass(frozen=True)
class Body:
    """The body of one repacked linear.

    Attributes:
        address: where it is, aligned to 64 bytes.
        size: its bytes.
        checksum: of the linear, compared when the body is first used.
        mapped: whether it is in a mapped file, whose pages come and go.
        memory: what has to live for as long as it is used.
        name: the file and the linear, for errors.
    """

    address: int
    size: int
    checksum: int
    mapped: bool
    memory: Any
    name: str

    def damaged(self) -> CheckpointError:
        """The error of a body that is not as its checksum says."""
        return CheckpointError(
            f"{self.name}: differs from its checksum: the file is damaged, or of other shards; "
            "delete it, or make it anew with `dbrx-quant repack`"
        )


_bodies: dict[tuple[int, ...], tuple[Body, tuple[int, ...]]] = {}


def give_body(tensors: Sequence[Tensor], out_features: int, body: Body) -> None:
    """Have a linear use a body from now on; what was made of its tensors before stays in use.

    Args:
        tensors: its stored tensors, and its bias where it has one.
        out_features: its columns that are wanted.
        body: made of these tensors.
    """
    remember(_bodies, _key(tensors, out_features), tensors, (body, _state(tensors)))


def body_of(tensors: Sequence[Tensor], out_features: int) -> Body | None:
    """The body that a linear was given, unless its tensors were modified since."""
    found = _bodies.get(_key(tensors, out_features))
    return found[0] if found is not None and found[1] == _state(tensors) else None


def _state(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """What changes when a tensor is written to, or its data is replaced."""
    return (version_sum(tensors), *map(Tensor.data_ptr, tensors))


def _key(tensors: Sequence[Tensor], out_features: int) -> tuple[int, ...]:
    return (out_features, *map(id, tensors))
