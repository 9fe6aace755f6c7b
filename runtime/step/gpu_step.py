"""Steps on a GPU: a model's layers in the form of `dbrxq_cuda_decode`, captured as one graph for each shape.

What changes from step to step (tokens, positions, where the cache is) goes into device memory of fixed place.
So the first step of a shape [B, T] runs as it is enqueued, the second one is captured, and all others launch
its graph, whatever cache they come with.
"""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.families.parts import LayerParts
from dbrx_quant.runtime.kernels.cuda import expert_block
from dbrx_quant.runtime.kernels.cuda_tiles import aligned, current, device_linear, stream
from dbrx_quant.runtime.kernels.stored import Stored, StoredList
from dbrx_quant.runtime.library import _abi, _cuda
from dbrx_quant.runtime.step.cache_bits import cache_bits
from dbrx_quant.runtime.step.layers import NotNativeError, Rotations, decoder_fields, plain_parts
from dbrx_quant.runtime.step.sampling import MOST_ROWS, NOTED, Ahead, Sampling

_MOST_HEAD = 256  # kMostHead of csrc/cuda/decoder/decoder.cuh
_PLAIN = 3  # (keys, values, capacity): a cache without scales


class _Graph:
    """A captured step; freed with the object."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        weakref.finalize(self, _cuda.library().dbrxq_cuda_graph_free, handle).atexit = False


@dataclass
class _Shape:
    """The steps of one shape [B, T] and kind of cache, with or without a choice of the next token.

    Attributes:
        step: the struct that all of them share.
        graph: their graph, from the second on.
    """

    step: _abi.CudaStep
    graph: _Graph | None = None


class GpuStep:
    """A decoder on a GPU, ready for native steps.

    Args:
        model: the decoder.
        device: where all of it is.

    Raises:
        NotNativeError: it has none in its current state.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        if _cuda.why_unavailable(device) is not None:
            raise NotNativeError
        parts, last = plain_parts(model)
        embedding, fields = model.get_input_embeddings(), decoder_fields(parts, last)
        head_dim = fields["head_dim"]
        self._device, self._dtype, self.layers = device, last.dtype, len(parts)
        self._rotations = Rotations(model.rotary_emb, head_dim, device)
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise NotNativeError
        table = embedding.weight
        if table.dtype != last.dtype or not table.is_contiguous():
            raise NotNativeError
        if not self._rotations.constant or head_dim > _MOST_HEAD:
            raise NotNativeError
        # Detached: who replaces a tensor's data may not free what a step reads that is on its way.
        self._keep: list[Any] = [table.detach()]
        self._shape, self._hidden = (fields["key_heads"], head_dim), fields["hidden"]
        structs = (_abi.CudaDecoderLayer * len(parts))(*(self._layer(part) for part in parts))
        self._decoder = _abi.CudaDecoder(
            layers=ctypes.addressof(structs),
            embedding=table.data_ptr(),
            final_norm=self._float(last),
            vocabulary=table.shape[0],
            cache_bits=16,  # `_point_at` sets it
            **fields,
        )
        self._keep.append(structs)
        self._shapes: dict[tuple[int, int, int, bool], _Shape] = {}
        self._ahead: Ahead | None = None
        self._tokens = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self._past = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
        with current(device):
            size = self._largest_workspace()
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._states = torch.empty(MOST_ROWS, self._hidden, dtype=last.dtype, device=device)
        entries = self.layers * ctypes.sizeof(_abi.CudaCache)
        self._caches = torch.zeros(entries, dtype=torch.uint8, device=device)
        self._places: list[Any] = []  # what is in it

    def fits(self) -> bool:
        """Whether it can still be used: no setting changes what it computes."""
        return True

    def layer_kind(self) -> Any:
        """The class of a cache's layers that steps read and write."""
        from dbrx_quant.runtime.step.byte_cache import ByteLayer
        from dbrx_quant.runtime.step.kv_cache import GrowingLayer

        return ByteLayer if cache_bits() == 8 else GrowingLayer

    def run(self, ids: Tensor, layers: Sequence[Any], past: int) -> Tensor | None:
        """The states [B, T, D] behind the last norm; None: ids or cache are elsewhere, or of another kind.

        Args:
            ids: of the new tokens, [B, T].
            layers: of the cache, `GrowingLayer`s with `past` positions each.
            past: positions.
        """
        (sequences, tokens), rows = ids.shape, ids.numel()
        if not self._begin(ids, layers, past, past + tokens):
            return None
        with current(self._device):
            self._run(sequences, tokens, None)
        return self._states[:rows].clone().view(sequences, tokens, self._hidden)

    def run_ahead(
        self, ids: Tensor, layers: Sequence[Any], past: int, head: Any, sampling: Sampling, count: int
    ) -> Tensor | None:
        """The `count` tokens that follow in each sequence, int64 [B, count]; None: as `run`.

        The host waits for nothing: each step chooses the next one's tokens. Afterwards the cache has what
        went in, all but the last token.

        Args:
            ids: of the first tokens, [B, 1].
            layers: of the cache, with `past` positions each.
            past: positions.
            head: the linear behind the last norm, D -> vocabulary.
            sampling: how tokens are chosen.
            count: of tokens.
        """
        sequences = ids.shape[0]
        if not self._begin(ids, layers, past, past + count):
            return None
        if self._ahead is None or not self._ahead.serves(head):
            self._ahead = Ahead(head, self._linear(head), self._decoder.vocabulary, self._device)
            self._decoder.head = self._ahead.address
            self._shapes = {key: shape for key, shape in self._shapes.items() if not key[3]}
        self._ahead.begin(sampling)
        with current(self._device):
            made = []
            for first in range(0, count, NOTED):
                self._ahead.made.zero_()
                steps = min(NOTED, count - first)
                for _ in range(steps):
                    self._run(sequences, 1, self._ahead)
                made.append(self._ahead.generated[:sequences, :steps].clone())
        return torch.cat(made, dim=1)

    def _begin(self, ids: Tensor, layers: Sequence[Any], past: int, length: int) -> bool:
        """Put in place what steps up to `length` positions read; False: ids or cache are of another kind."""
        if ids.device != self._device:
            return False
        shape = (ids.shape[0], *self._shape)
        places = [layer.place(shape, self._dtype, length, self._device) for layer in layers]
        if None in places:
            return False
        with current(self._device):
            self._point_at(places)
            self._tokens[: ids.numel()].copy_(ids.reshape(ids.numel()))
            self._past.fill_(past)
        return True

    def _point_at(self, places: list[Any]) -> None:
        """Let steps use the cache at `places`: of each layer the addresses and, last, the capacity."""
        if places == self._places:
            return
        # Whatever room a cache has, as it has it at once: no step between may find one without rotations.
        cosines, sines = self._rotations.table(max(place[-1] for place in places))
        if cosines.data_ptr() != self._decoder.cosines:
            self._decoder.cosines, self._decoder.sines = cosines.data_ptr(), sines.data_ptr()
            for own in self._shapes.values():
                own.graph = None  # the old table is theirs
            self._keep.append((cosines, sines))
        entries = (_abi.CudaCache * len(places))(
            *(_abi.CudaCache(*addresses, capacity=room) for *addresses, room in places)
        )
        self._caches.copy_(torch.frombuffer(bytearray(bytes(entries)), dtype=torch.uint8))
        self._places = places
        self._decoder.cache_bits = 8 if len(places[0]) > _PLAIN else 16

    def _run(self, sequences: int, tokens: int, ahead: Ahead | None) -> None:
        key = (sequences, tokens, self._decoder.cache_bits, ahead is not None)
        native, decoder, on = _cuda.library(), ctypes.byref(self._decoder), stream(self._device)
        own = self._shapes.get(key)
        if own is None:
            self._shapes[key] = own = self._new_shape(sequences, tokens, ahead)
            _cuda.check(native.dbrxq_cuda_decode(decoder, ctypes.byref(own.step), on), "decode")
            return
        if own.graph is None:
            handle = ctypes.c_void_p()
            status = native.dbrxq_cuda_decode_capture(decoder, ctypes.byref(own.step), ctypes.byref(handle))
            _cuda.check(status, "decode (capture)")
            assert handle.value is not None
            own.graph = _Graph(handle.value)
        _cuda.check(native.dbrxq_cuda_graph_launch(own.graph.handle, on), "decode")

    def _largest_workspace(self) -> int:
        """Bytes that the steps of all shapes share."""
        largest, size = 0, ctypes.c_int64()
        for sequences in range(1, MOST_ROWS + 1):
            for tokens in range(1, MOST_ROWS // sequences + 1):
                status = _cuda.library().dbrxq_cuda_decode_workspace(
                    ctypes.byref(self._decoder), sequences, tokens, ctypes.byref(size)
                )
                _cuda.check(status, "decode")
                largest = max(largest, size.value)
        return largest

    def _new_shape(self, sequences: int, tokens: int, ahead: Ahead | None) -> _Shape:
        step = _abi.CudaStep(
            tokens=self._tokens.data_ptr(),
            past=self._past.data_ptr(),
            cache=self._caches.data_ptr(),
            states=self._states.data_ptr() if ahead is None else None,
            workspace=self._workspace.data_ptr(),
            sequences=sequences,
            new_tokens=tokens,
        )
        if ahead is not None:
            ahead.describe(step)
        return _Shape(step)

    def _kept(self, tensors: Sequence[Tensor]) -> None:
        self._keep += [tensor.detach() for tensor in tensors]

    def _float(self, tensor: Tensor | None) -> int | None:
        """The address of a norm or router; of a copy where it is not aligned to 16 bytes."""
        if tensor is None:
            return None
        self._kept([aligned(tensor, 16)])
        address: int = self._keep[-1].data_ptr()
        return address

    def _linear(self, linear: Any) -> int:
        """The address of a linear's struct."""
        stored: Stored = linear.stored()
        made = device_linear(stored)
        struct = made.described(linear.out_features, linear.bias)
        self._keep += [made, struct]
        self._kept([*stored, *([] if linear.bias is None else [linear.bias])])
        return ctypes.addressof(struct)

    def _experts(self, part: LayerParts) -> int:
        """The address of the struct of a layer's experts; a dense layer's linears are the only one."""
        if part.experts is not None:
            if part.experts.host_experts:  # the host computes some of them, and no graph waits for it
                raise NotNativeError
            gate, up, down = (part.experts.stored(key) for key in part.experts.keys)
        else:
            assert part.mlp is not None
            if any(linear.bias is not None for linear in part.mlp):
                raise NotNativeError
            gate, up, down = (StoredList([*linear.stored()]) for linear in part.mlp)
        try:
            block = expert_block(torch.empty(0, self._hidden, device=self._device), gate, up, down)
        except ValueError as error:  # experts of several sizes
            raise NotNativeError from error
        struct = _abi.CudaExperts.from_buffer_copy(block.struct)
        struct.activation = _abi.ACTIVATIONS[part.activation]
        self._keep += [block, struct]
        self._kept([*gate.tensors, *up.tensors, *down.tensors])
        return ctypes.addressof(struct)

    def _layer(self, part: LayerParts) -> _abi.CudaDecoderLayer:
        query_norm, key_norm = part.head_norms or (None, None)
        return _abi.CudaDecoderLayer(
            attention_norm=self._float(part.norms[0]),
            mlp_norm=self._float(part.norms[1]),
            query_norm=self._float(query_norm),
            key_norm=self._float(key_norm),
            qkv=tuple(self._linear(linear) for linear in part.qkv),
            output=self._linear(part.output),
            experts=self._experts(part),
            router=self._float(part.router),
            active=part.active,
            expert_norm=part.expert_norm,
        )
