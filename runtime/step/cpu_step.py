"""Steps on the CPU: a model's layers in the form of `dbrxq_decode`, and the calls of it."""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.families.parts import LayerParts
from dbrx_quant.runtime.kernels.activations import BITS, activations
from dbrx_quant.runtime.kernels.repacked import Repacked, raise_damaged, repacked_experts, repacked_linear
from dbrx_quant.runtime.library import _abi, _native
from dbrx_quant.runtime.step.layers import NotNativeError, Rotations, decoder_fields, plain_parts

_DEVICE = torch.device("cpu")


class CpuStep:
    """A decoder on the CPU, ready for native steps.

    Args:
        model: the decoder.

    Raises:
        NotNativeError: it has none in its current state.
    """

    def __init__(self, model: Any) -> None:
        if not _native.available():
            raise NotNativeError
        parts, last = plain_parts(model)
        self._model, self._mode, self._dtype = model, activations(), last.dtype
        self.layers = len(parts)
        self._keep: list[Any] = [last, parts]
        self._repacked: list[Repacked] = []
        structs = (_abi.DecoderLayer * len(parts))(*(self._layer(part) for part in parts))
        fields = decoder_fields(parts, last)
        self._shape = (fields["key_heads"], fields["head_dim"])
        self._rotations = Rotations(model.rotary_emb, fields["head_dim"], _DEVICE)
        self._decoder = _abi.Decoder(
            layers=structs,
            final_norm=last.data_ptr(),
            activation=_abi.ACTIVATIONS[parts[0].activation],
            activation_bits=BITS[self._mode],
            **fields,
        )

    def fits(self) -> bool:
        """Whether activations are still rounded as they were."""
        return self._mode == activations()

    def layer_kind(self) -> Any:
        """The class of a cache's layers that steps read and write."""
        from dbrx_quant.runtime.step.kv_cache import GrowingLayer

        return GrowingLayer

    def run(self, ids: Tensor, layers: Sequence[Any], past: int) -> Tensor | None:
        """The states [B, T, D] behind the last norm; None: the cache is of another kind.

        Args:
            ids: of the new tokens, [B, T].
            layers: of the cache, `GrowingLayer`s with `past` positions each.
            past: positions.
        """
        sequences, tokens = ids.shape
        shape, length = (sequences, *self._shape), past + tokens
        places = [layer.place(shape, self._dtype, length, _DEVICE) for layer in layers]
        if None in places:
            return None
        embedded = self._model.get_input_embeddings()(ids)
        x = embedded.to(torch.float32).contiguous()
        cosines, sines, row = self._rotations.at(past, length)
        offset = row * self._shape[1] * 4
        pointers = (ctypes.c_int64 * (3 * self.layers))(*chain.from_iterable(places))
        y = torch.empty_like(x)
        status = _native.library().dbrxq_decode(
            self._decoder,
            pointers,
            sequences,
            tokens,
            past,
            cosines.data_ptr() + offset,
            sines.data_ptr() + offset,
            x.data_ptr(),
            y.data_ptr(),
        )
        if status == _abi.DAMAGED:
            raise_damaged([block for each in self._repacked for block in each.blocks])
        _native.check(status, "decode")
        return y.to(embedded.dtype)

    def _layer(self, part: LayerParts) -> _abi.DecoderLayer:
        singles = []
        for linear in (*part.qkv, part.output, *(part.mlp or ())):
            fast = repacked_linear(linear.stored(), linear.bias, linear.out_features)
            if fast is None:
                raise NotNativeError
            self._repacked.append(fast)
            singles.append(fast.blocks[0].address)
        struct = _abi.DecoderLayer(
            attention_norm=part.norms[0].data_ptr(),
            mlp_norm=part.norms[1].data_ptr(),
            qkv=tuple(singles[:3]),
            output=singles[3],
            mlp=tuple(singles[4:]),
        )
        if part.head_norms is not None:
            struct.query_norm, struct.key_norm = (norm.data_ptr() for norm in part.head_norms)
        if part.experts is not None:
            assert part.router is not None
            experts = part.experts
            gate, up, down = (experts.stored(key) for key in experts.keys)
            fast = repacked_experts(torch.empty(0, experts.hidden_size), gate, up, down)
            if fast is None:
                raise NotNativeError
            self._repacked.append(fast)
            struct.router, struct.expert_count, struct.active = (
                part.router.data_ptr(),
                experts.num_experts,
                part.active,
            )
            struct.experts, struct.expert_norm = ctypes.addressof(fast.pointers), part.expert_norm
        return struct
