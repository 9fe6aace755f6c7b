"""A device that is none: tensors on it compute on the CPU, and meet tensors of the host in no operation.

    with far_device() as memory:
        far = tensor.to(FAR)       # allowed, as .cpu(), copy_ and the assignment of slices are
        far + tensor               # MixedDevices, as on a GPU; 0-dimensional tensors of the host may meet it
        memory.peak                # bytes

torch knows a device type "lazy", which no build for CPUs has; here a tensor on it wraps one on the CPU.
It is as strict as a GPU or stricter: indices have to be where what they index is.
`lazy:0` and `lazy:1` are two such devices.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("lazy")
# What torch would compute from other operations, with other last bits, on a device that has no kernel for it.
_KERNELS = torch.library.Library("aten", "IMPL", "Lazy")
_KERNELS.impl("silu_backward", lambda *_: NotImplemented)
_WAYS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # between devices


class MixedDevices(RuntimeError):
    """An operation got tensors of both devices."""


@dataclass
class Memory:
    """Bytes on the device, now and at most."""

    now: int = 0
    peak: int = 0
    _holders: Counter = field(default_factory=Counter)

    def hold(self, owner, near):
        """Count the memory of `near` for as long as `owner` lives; tensors that share it are counted once."""
        storage = near.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self._holders[address] += 1
        if self._holders[address] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(owner, self._release, address, size)

    def _release(self, address, size):
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.now -= size


class FarTensor(Tensor):
    """A tensor on the device; its values are in `near`."""

    @staticmethod
    def __new__(cls, near, device=FAR):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device,
        )

    def __init__(self, near, device=FAR):
        self.near = near

    def __repr__(self):
        return f"FarTensor({self.near})"

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation}: a tensor on the device has outlived it")


class _Far(TorchDispatchMode):
    def __init__(self, memory):
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, FarTensor)}
        asked = kwargs.get("device")
        if far and operation not in _WAYS:
            _refuse_mixed(operation, tensors)
        there = next((tensor.device for tensor in far.values()), None)
        if asked is not None:
            there = torch.device(asked) if torch.device(asked).type == FAR.type else None
            kwargs = {**kwargs, "device": asked if there is None else torch.device("cpu")}
        if operation is torch.ops.aten.copy_.default:
            there = args[0].device if isinstance(args[0], FarTensor) else None
        result = operation(*tree_map(_near, args), **tree_map(_near, kwargs))
        return tree_map(lambda leaf: leaf if there is None else self._wrapped(leaf, there, far), result)

    def _wrapped(self, leaf, device, far):
        """A result on a device; what was changed in place is who it was."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in far:
            return far[id(leaf)]
        wrapped = FarTensor(leaf, device)
        self._memory.hold(wrapped, leaf)
        return wrapped


class _MadeFar(TorchFunctionMode):
    """Tensors from Python's numbers: torch makes them by a kernel of the device, before any dispatch mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if function is torch.tensor and asked is not None and torch.device(asked).type == FAR.type:
            return function(*args, **{**kwargs, "device": "cpu"}).to(asked)
        return function(*args, **kwargs)


def _near(leaf):
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _refuse_mixed(operation, tensors):
    """Raise MixedDevices if tensors of the host with dimensions or of two devices meet."""
    host = [tensor for tensor in tensors if not isinstance(tensor, FarTensor)]
    big = any(tensor.dim() for tensor in tensors if isinstance(tensor, FarTensor))
    devices = {tensor.device for tensor in tensors if isinstance(tensor, FarTensor)}
    if len(devices) > 1 or any(tensor.dim() or not big for tensor in host):
        places = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise MixedDevices(f"{operation}: tensors of two devices: {places}")


@contextmanager
def far_device():
    """The device is there inside the `with` block; yields its `Memory`."""
    memory = Memory()
    # what torch.norm computes by its faster way where it knows the device, with other last bits of gradients
    with patch.object(backend_registration, "_privateuse1_backend_name", FAR.type), _Far(memory), _MadeFar():
        yield memory


def both(compute):
    """What `compute` gives from tensors on the CPU, and from tensors on the device, brought back."""
    here = compute(torch.device("cpu"))
    with far_device():
        there = compute(FAR)
        back = [t.cpu() if isinstance(t, torch.Tensor) else t for t in there]
    return here, back


def same(here, there):
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
