"""Decoding on the CPU without Python between the layers: all layers of a model as one native call.

Between two linears of a small model lie a few microseconds of arithmetic and a hundred of Python. So a loaded
model's decoder (the model below the head) gets a `forward` that hands whole steps to `dbrxq_decode`.

The native step is taken when all of this holds; else the call goes to transformers' own code, at any time,
with the same cache:

* the model is of a family that has `layer_parts`, wholly on the CPU, in fp32, bf16 or fp16, all linears
  of its layers quantized, without sliding windows, with transformers' "sdpa" or "eager" attention;
* activations are rounded (`int8` or `int16`, see `activations`);
* the call has token ids of at most 8 new tokens in all, no padding (no mask, or one without zeros), positions
  that go on from the cache, and a `DynamicCache`, whose layers are replaced by `GrowingLayer`s;
* evaluation without gradients, hooks, adapters, foreign modules or code, autocast, compilation or tracing;
* no attribute of a module was changed since the model was loaded, those that are `ADOPTED` aside;
* no hidden states, attentions or router logits are asked for.

All of it is looked at before every step (`snapshot.py`): what changes is taken up, or the model is left to
transformers until it is as it was.

Activations are fp32 from the first layer to the last norm also in bf16 and fp16 models, whose own code rounds
them after every operation; only keys and values have the model's dtype. Otherwise both ways compute the same,
but for the order of sums.

DBRXQ_NATIVE_STEP=0 or `use_native_step(False)` leave every call to transformers.
"""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.parts import ADOPTED, LayerParts, UnknownPartError
from dbrx_quant.runtime.kernels.activations import BITS, activations
from dbrx_quant.runtime.kernels.repacked import Repacked, raise_damaged, repacked_experts, repacked_linear
from dbrx_quant.runtime.library import _abi, _native
from dbrx_quant.runtime.model.snapshot import Snapshot, attributes

VARIABLE = "DBRXQ_NATIVE_STEP"
MOST_TOKENS = 8

_ATTENTIONS = ("sdpa", "eager")
_CONSTANT_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
_ASKED = ("output_hidden_states", "output_attentions", "output_router_logits")

_enabled: bool | None = None


def native_step_enabled() -> bool:
    """Whether steps may run natively: yes, unless DBRXQ_NATIVE_STEP is 0 or `use_native_step` says no.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    global _enabled
    if _enabled is None:
        value = os.environ.get(VARIABLE) or "1"
        if value not in ("0", "1"):
            raise ValueError(f"{VARIABLE}: {value!r}, expected 0 or 1")
        _enabled = value == "1"
    return _enabled


@contextmanager
def use_native_step(enabled: bool) -> Iterator[None]:
    """Allow native steps, or leave all calls to transformers, inside the block, in all threads."""
    global _enabled
    before = native_step_enabled()
    _enabled = enabled
    try:
        yield
    finally:
        _enabled = before


def layer_parts(model: Any) -> tuple[list[LayerParts], Tensor] | None:
    """The parts of every layer of a decoder (the model below its head), and the weight of its last norm.

    None where the model, or any layer, is none that is known here.
    """
    find = family_of(model.config.model_type).layer_parts
    if find is None or getattr(model.config, "sliding_window", None) is not None:
        return None
    try:
        found = find(model)
        shared = {(p.eps, p.head_dim, p.scale, p.clip, p.layer_norm, p.activation) for p in found.layers}
    except (UnknownPartError, AttributeError, TypeError, ValueError):  # also attributes that are gone, or odd
        return None
    if len(shared) != 1 or found.layers[0].eps != found.eps or not all(map(_is_plain, found.layers)):
        return None
    return found.layers, found.last_norm


def _is_plain(part: LayerParts) -> bool:
    """Whether a layer's numbers are such that the native library means the same by them."""
    numbers = (part.eps, part.scale, part.clip, part.expert_norm)
    experts = 1 if part.experts is None else part.experts.num_experts
    active = 1 if part.experts is None else part.active
    return (
        all(isinstance(number, (int, float)) for number in numbers)
        and part.clip > 0
        and 0 <= part.expert_norm < math.inf
        and type(active) is int
        and 1 <= active <= experts
    )


def _same(one: Any, other: Any) -> bool:
    """Whether an attribute has the same value: plain ones by value, others by identity."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, (int, float, str, tuple)) and bool(one == other)


class _Rotations:
    """Cosines and sines of the positions, from the model's own module; cached where they never change."""

    def __init__(self, module: Any, head_dim: int) -> None:
        self._module, self._head_dim = module, head_dim
        self._constant = module.rope_type in _CONSTANT_ROPES
        self._table: tuple[Tensor, Tensor] | None = None

    def _compute(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        cosines, sines = self._module(torch.empty(1), torch.arange(first, last)[None])
        expected = (1, last - first, self._head_dim)
        if cosines.shape != expected or sines.shape != expected:
            raise RuntimeError(f"rotary embedding of shape {tuple(cosines.shape)}, expected {expected}")
        return cosines[0].contiguous(), sines[0].contiguous()

    def at(self, first: int, last: int) -> tuple[Tensor, Tensor, int]:
        """(cosines, sines, row of position `first` in both), [.., head_dim] fp32."""
        if not self._constant:
            return (*self._compute(first, last), 0)
        table = self._table
        if table is None or table[0].shape[0] < last:
            self._table = table = self._compute(0, max(256, 1 << (last - 1).bit_length()))
        return (*table, first)


class _NotNativeError(Exception):
    """The model has a feature that the native step does not support."""


class _Built:
    """A model's layers in the form that the native library takes.

    Attributes:
        decoder: the struct.
        snapshot: of the model when it was made.
        mode: how activations are rounded.
        dtype: of the model.
        shape: (J, head_dim), of keys and values.
        layers: number of layers.
        rotations: of its positions.
    """

    def __init__(
        self, model: Any, parts: list[LayerParts], last: Tensor, mode: str, snapshot: Snapshot
    ) -> None:
        self.snapshot, self.mode, self.dtype, self.layers = snapshot, mode, last.dtype, len(parts)
        self._keep: list[Any] = [last, parts]
        self._repacked: list[Repacked] = []
        structs = (_abi.DecoderLayer * len(parts))(*(self._layer(part) for part in parts))
        first = parts[0]
        heads, key_heads = (first.qkv[i].out_features // first.head_dim for i in (0, 1))
        self.shape = (key_heads, first.head_dim)
        self.rotations = _Rotations(model.rotary_emb, first.head_dim)
        self.decoder = _abi.Decoder(
            layers=structs,
            final_norm=last.data_ptr(),
            layer_count=len(parts),
            hidden=last.shape[0],
            heads=heads,
            key_heads=key_heads,
            head_dim=first.head_dim,
            scale=first.scale,
            clip=first.clip,
            eps=first.eps,
            layer_norm=first.layer_norm,
            activation=_abi.ACTIVATIONS[first.activation],
            dtype=_abi.DTYPES[last.dtype],
            activation_bits=BITS[mode],
        )

    def check(self, status: int) -> None:
        """Raise for a status of a step."""
        if status == _abi.DAMAGED:
            raise_damaged([block for each in self._repacked for block in each.blocks])
        _native.check(status, "decode")

    def _layer(self, part: LayerParts) -> _abi.DecoderLayer:
        singles = []
        for linear in (*part.qkv, part.output, *(part.mlp or ())):
            fast = repacked_linear(linear.stored(), linear.bias, linear.out_features)
            if fast is None:
                raise _NotNativeError
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
                raise _NotNativeError
            self._repacked.append(fast)
            struct.router, struct.expert_count, struct.active = (
                part.router.data_ptr(),
                experts.num_experts,
                part.active,
            )
            struct.experts, struct.expert_norm = ctypes.addressof(fast.pointers), part.expert_norm
        return struct


def _build(model: Any, mode: str, original: dict[str, Any]) -> _Built | Snapshot:
    """The native form of a model; only its snapshot if it has none in its current state.

    Args:
        model: the decoder.
        mode: how activations are rounded.
        original: its attributes when it was loaded.
    """
    snapshot = Snapshot(model)
    now = attributes(model)
    changed = {
        name for name, value in now.items() if name not in original or not _same(value, original[name])
    }
    plain = original.keys() <= now.keys() and {name.rpartition(".")[2] for name in changed} <= ADOPTED
    found = layer_parts(model) if plain and snapshot.is_known() and snapshot.all_on_cpu() else None
    if found is None or not _native.available():
        return snapshot
    parts, last = found
    floats = [last]
    for part in parts:
        floats += [*part.norms, *(part.head_norms or ()), *([] if part.router is None else [part.router])]
    dtypes = {tensor.dtype for tensor in floats}
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() for tensor in floats)
    if not plain or len(dtypes) != 1 or not dtypes <= _abi.DTYPES.keys() or parts[0].head_dim % 16:
        return snapshot
    try:
        return _Built(model, parts, last, mode, snapshot)
    except _NotNativeError:
        return snapshot


class NativeForward:
    """The `forward` of a decoder: `dbrxq_decode` for steps that it supports, else that of its class.

    Args:
        model: the decoder, whose attribute `forward` this becomes.
    """

    def __init__(self, model: Any) -> None:
        from transformers import modeling_outputs

        self.model = model
        self._original = attributes(model)
        self._output = getattr(modeling_outputs, family_of(model.config.model_type).output)
        self._built: _Built | Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None}  # pointers are neither copied nor pickled

    @property
    def __wrapped__(self) -> Any:
        """The original forward, so that its signature is found."""
        return MethodType(type(self.model).forward, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the decoder's class."""
        if torch.compiler.is_compiling():
            return type(self.model).forward(self.model, *args, **kwargs)
        states = None if args else self._step(**kwargs)
        if states is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        name = "cache" if kwargs.get("cache") is not None else "past_key_values"
        return self._output(last_hidden_state=states, **{name: kwargs[name]})

    def _ready(self, mode: str) -> _Built | None:
        """The native form of the model in its current state."""
        built = self._built
        if built is not None:
            snapshot = built if isinstance(built, Snapshot) else built.snapshot
            if not snapshot.holds() or (isinstance(built, _Built) and built.mode != mode):
                built = None
        if built is None:
            self._built = built = _build(self.model, mode, self._original)
        if isinstance(built, Snapshot) or built.snapshot.is_watched():
            return None
        return built

    def _step(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Tensor | None:
        """The states [B, T, D] behind the last norm; None: not a step for the native call.

        The cache is called `past_key_values` before transformers 5.24, and `cache` from there on.
        """
        held = past_key_values if cache is None else cache
        if input_ids is not None and input_ids.device.type != "cpu":
            self._built = None  # lets go of what the model had on the CPU
            return None
        if (
            type(input_ids) is not Tensor
            or held is None
            or inputs_embeds is not None
            or use_cache is False
            or not 0 < input_ids.numel() <= MOST_TOKENS
            or input_ids.dim() != 2
            or torch.is_grad_enabled()
            or not native_step_enabled()
        ):
            return None
        mode = activations()
        model = self.model
        if mode == "float" or _requests_extra_outputs(model.config, options):
            return None
        built = self._ready(mode)
        if built is None or torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state() is not None:
            return None

        from dbrx_quant.runtime.model.kv_cache import growing_layers, same_length

        layers = growing_layers(held, built.layers)
        past = None if layers is None else same_length(layers)
        sequences, tokens = input_ids.shape
        if (
            layers is None
            or past is None
            or not _is_continuation(attention_mask, position_ids, sequences, tokens, past)
        ):
            return None
        shape, length = (sequences, *built.shape), past + tokens
        places = [layer.place(shape, built.dtype, length) for layer in layers]
        if None in places:
            return None
        embedded = model.get_input_embeddings()(input_ids)
        x = embedded.to(torch.float32).contiguous()
        cosines, sines, row = built.rotations.at(past, length)
        offset = row * built.shape[1] * 4
        pointers = (ctypes.c_int64 * (3 * built.layers))(*chain.from_iterable(places))  # type: ignore[arg-type]
        y = torch.empty_like(x)
        status = _native.library().dbrxq_decode(
            built.decoder,
            pointers,
            sequences,
            tokens,
            past,
            cosines.data_ptr() + offset,
            sines.data_ptr() + offset,
            x.data_ptr(),
            y.data_ptr(),
        )
        built.check(status)
        for layer in layers:
            layer.advance(tokens)
        return y.to(embedded.dtype)


def _requests_extra_outputs(config: Any, options: dict[str, Any]) -> bool:
    """Whether a call requests outputs besides states and cache, or has arguments unknown here."""
    for name, value in options.items():
        if value and not (name == "return_dict" and value is True):
            return True
        if name == "return_dict" and value is False:
            return True
    if any(getattr(config, name, False) for name in _ASKED if name not in options):
        return True
    if config._attn_implementation not in _ATTENTIONS or not getattr(config, "is_causal", True):
        return True
    return options.get("return_dict") is None and not config.return_dict


def _is_continuation(
    mask: Tensor | None, positions: Tensor | None, sequences: int, tokens: int, past: int
) -> bool:
    """Whether mask and positions just append `tokens` new tokens after `past`, in every sequence."""
    if mask is not None and (mask.shape != (sequences, past + tokens) or not bool(mask.all())):
        return False
    if positions is None:
        return True
    expected = list(range(past, past + tokens))
    return positions.dim() == 2 and all(row == expected for row in positions.tolist())


def install_native_step(model: Any) -> None:
    """Let a loaded causal language model take native steps where it can."""
    decoder = model.base_model
    if decoder is not model and layer_parts(decoder) is not None:
        decoder.forward = NativeForward(decoder)
