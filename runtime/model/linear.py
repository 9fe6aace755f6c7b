"""Linear layers over packed weights: `QuantLinear`, and `FusedLinear` for what the file stores in parts.

Axes: K input channels, N output channels as stored (a multiple of 32), G groups, R word rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.exl2.format import SUFFIXES, TENSORS, padded_columns
from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.kernels.ops import linear_op, linears_op
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _cuda

_HALVES = tuple(name for name, (dtype, _) in TENSORS.items() if dtype == torch.float16)


class QuantLinear(nn.Module):
    """y = x W + bias with W kept packed; sums are in fp32, y has x's dtype.

    On the CPU `kernels/activations.py` says how exactly: by default a repacked copy of W, made at the first
    call, meets activations rounded to integers.

    Built from sizes alone, so that it can live on the meta device until a loader assigns its buffers:
    q_weight int32 [R, N], q_scale int32 [G, N/8], q_scale_max fp16 [G], q_groups int16 [2 G],
    q_invperm int32 [K] and, with a bias, bias fp16 [N]. Any contiguous tensors will do, memory-mapped ones
    too: nothing is copied.

    Moved to a GPU, it keeps q_weight in the layout of the kernels there (`kernels/cuda_tiles.py`) instead
    of the file's. Moved away, in `tensors()` and in a state_dict, q_weight is as in the file again. One that
    stays on the host (`stay_on_host`) is not moved with its model.

    Args:
        in_features: K.
        out_features: columns of y; N is this rounded up to 32.
        word_rows: R.
        groups: G.
        bias: whether the linear has one.
        device: where the (uninitialised) buffers are made.
    """

    q_weight: Tensor
    q_scale: Tensor
    q_scale_max: Tensor
    q_groups: Tensor
    q_invperm: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        word_rows: int,
        groups: int,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.stays = False
        n = padded_columns(out_features)

        def register(name: str, *shape: int) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=TENSORS[name][0], device=device))

        register("q_weight", word_rows, n)
        register("q_scale", groups, n // 8)
        register("q_scale_max", groups)
        register("q_groups", 2 * groups)
        register("q_invperm", in_features)
        if bias:
            register("bias", n)
        else:
            self.register_buffer("bias", None)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], out_features: int | None = None) -> "QuantLinear":
        """A layer that holds these tensors (keyed by suffix) themselves; all stored columns by default."""
        word_rows, n = tensors["q_weight"].shape
        layer = cls(
            tensors["q_invperm"].shape[0],
            n if out_features is None else out_features,
            word_rows=word_rows,
            groups=tensors["q_scale_max"].shape[0],
            bias="bias" in tensors,
            device="meta",
        )
        if padded_columns(layer.out_features) != n:
            raise ValueError(f"{layer.out_features} output features do not fit {n} stored columns")
        for suffix in (*SUFFIXES, *(["bias"] if "bias" in tensors else [])):
            setattr(layer, suffix, tensors[suffix])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., out_features] of x [..., in_features]."""
        stored = self._buffers  # not by attribute: six look-ups through the module cost as much as the kernel
        y: Tensor = linear_op(
            x,
            stored["q_weight"],
            stored["q_scale"],
            stored["q_scale_max"],
            stored["q_groups"],
            stored["q_invperm"],
            stored["bias"],
            self.out_features,
        )
        return y

    def stored(self) -> Stored:
        """The five tensors of the weight."""
        buffers: dict[str, Any] = self._buffers  # not by attribute: as in `forward`
        return Stored.of(buffers)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, keyed by suffix, as the file has them: q_weight is a copy where it is tiled."""
        with self._as_stored():
            return dict(self.named_buffers(recurse=False))

    def stay_on_host(self) -> None:
        """Leave the tensors where they are from now on, wherever the model is moved."""
        self.stays = True

    def tile(self) -> None:
        """Put q_weight into the layout of the CUDA kernels, if it is on a GPU and they are available.

        The file's words are let go; while the new ones are made, both are there.
        """
        stored = self.stored()
        if self.stays:
            return
        device = stored.q_weight.device
        if cuda_tiles.on_gpu(stored.q_weight) and not stored.tiled and _cuda.why_unavailable(device) is None:
            self._buffers["q_weight"] = cuda_tiles.tile(stored)

    def untile(self) -> None:
        """Put q_weight back into the file's layout."""
        stored = self.stored()
        if stored.tiled:
            self._buffers["q_weight"] = cuda_tiles.untile(stored)

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Inside the block, a tiled q_weight is replaced by a copy of the file's words."""
        kept = self._buffers["q_weight"]
        self.untile()
        try:
            yield
        finally:
            self._buffers["q_weight"] = kept

    def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> None:
        with self._as_stored():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: Any,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        self.untile()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.tile()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Other devices read the file's words; and `.to(torch.bfloat16)` means the activations: the fp16
        # tensors of the format keep their bits.
        if self.stays:
            return self
        empty = self.q_weight.is_meta
        self.untile()
        before = {name: self._buffers[name] for name in _HALVES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in before.items():
            after = self._buffers[name]
            if original is not None and after is not None and after.dtype != original.dtype:
                self._buffers[name] = original.to(after.device)
        if not empty:  # else a loader fills the buffers, and calls `tile`
            self.tile()
        return self

    def extra_repr(self) -> str:
        bits = 32 * self.q_weight.shape[0] / max(1, self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {bits:.2f} bits a code, {self.q_scale_max.shape[0]} groups"
        )


class FusedLinear(nn.Module):
    """Layers that read the same input, their outputs side by side: DBRX's Wqkv as q_proj, k_proj and v_proj.

    Args:
        layers: child name to layer, in the order of the outputs; the file's tensors load into the children.
    """

    def __init__(self, layers: Mapping[str, QuantLinear]) -> None:
        super().__init__()
        widths = {layer.in_features for layer in layers.values()}
        if len(widths) != 1:
            raise ValueError(f"fused layers read inputs of {sorted(widths)} channels; expected one width")
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.in_features = widths.pop()
        self.out_features = sum(layer.out_features for layer in layers.values())

    def forward(self, x: Tensor) -> Tensor:
        """The children's outputs side by side, [..., out_features], of x [..., in_features]."""
        layers = list(self.children())
        quantized = [layer for layer in layers if type(layer) is QuantLinear and not _has_hooks(layer)]
        if len(quantized) < len(layers):
            return torch.cat([layer(x) for layer in layers], dim=-1)
        y: Tensor = linears_op(
            x,
            [tensor for layer in quantized for tensor in layer.stored()],
            [layer.bias for layer in quantized],
            [layer.out_features for layer in quantized],
        )
        return y


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
