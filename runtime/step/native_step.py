"""Decoding without Python between the layers: all layers of a model as one native call.

Between two linears of a small model lie a few microseconds of arithmetic and a hundred of Python. So a
loaded model's decoder (the model below the head) gets a `forward` that hands whole steps to `dbrxq_decode` on
the CPU (`cpu_step.py`) or `dbrxq_cuda_decode` on a GPU (`gpu_step.py`).

The native step is taken when all of this holds; else the call goes to transformers' own code, at any time,
with the same cache:

* the model is of a family that has `layer_parts`, wholly on one device, in fp32, bf16 or fp16, all linears
  of its layers quantized, without sliding windows, with transformers' "sdpa" or "eager" attention;
* on the CPU, activations are rounded (`int8` or `int16`, see `activations`); on a GPU, the rotations do not
  depend on the length, heads have up to 256 channels, and dense feed-forward parts no biases;
* the call has token ids of at most 8 new tokens in all, no padding (no mask, or one without zeros), positions
  that go on from the cache, and a `DynamicCache`, whose layers are replaced by `GrowingLayer`s
  (or `ByteLayer`s, on a GPU);
* evaluation without gradients, hooks, adapters, foreign modules or code, autocast, compilation or tracing;
* no attribute of a module was changed since the model was loaded, those that are `ADOPTED` aside;
* no hidden states, attentions or router logits are asked for.

All of it is looked at in every step (`snapshot.py`): what changes is taken up, or the model is left to
transformers until it is as it was. On a GPU the step is under way while the model is looked at; if that says
no, what it computed is not used.

Activations are fp32 from the first layer to the last norm also in bf16 and fp16 models, whose own code rounds
them after every operation; only keys and values have the model's dtype. Otherwise both ways compute the same,
but for the order of sums.

DBRXQ_NATIVE_STEP=0 or `use_native_step(False)` leave every call to transformers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.families import family_of
from dbrx_quant.runtime.families.parts import ADOPTED
from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.kernels.activations import activations
from dbrx_quant.runtime.step.cpu_step import CpuStep
from dbrx_quant.runtime.step.gpu_step import GpuStep
from dbrx_quant.runtime.step.layers import NotNativeError, layer_parts
from dbrx_quant.runtime.step.snapshot import Snapshot, attributes

VARIABLE = "DBRXQ_NATIVE_STEP"
MOST_TOKENS = 8

_ATTENTIONS = ("sdpa", "eager")
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


def _same(one: Any, other: Any) -> bool:
    """Whether an attribute has the same value: plain ones by value, others by identity."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, (int, float, str, tuple)) and bool(one == other)


class _Form:
    """The native form of a model in its current state, if it has one.

    Args:
        model: the decoder.
        gpu: whether it is wanted on a GPU.
        original: the model's attributes when it was loaded.

    Attributes:
        snapshot: of the model when the form was made.
        step: the form; None if the model has none.
    """

    def __init__(self, model: Any, gpu: bool, original: dict[str, Any]) -> None:
        self.snapshot, self.gpu = Snapshot(model), gpu
        self.step: CpuStep | GpuStep | None = None
        now, device = attributes(model), self.snapshot.device()
        changed = {
            name for name, value in now.items() if name not in original or not _same(value, original[name])
        }
        plain = original.keys() <= now.keys() and {name.rpartition(".")[2] for name in changed} <= ADOPTED
        if not plain or not self.snapshot.is_known() or device is None:
            return
        try:
            if gpu:
                self.step = GpuStep(model, device)
            elif device.type == "cpu":
                self.step = CpuStep(model)
        except NotNativeError:
            pass

    def is_current(self) -> bool:
        """Whether the model is as it was."""
        return self.snapshot.holds() and (self.step is None or self.step.fits())

    def usable(self) -> CpuStep | GpuStep | None:
        """The form, unless a hook would miss its steps."""
        return None if self.snapshot.is_watched() else self.step


class NativeForward:
    """The `forward` of a decoder: a native call for steps that it supports, else that of its class.

    Args:
        model: the decoder, whose attribute `forward` this becomes.
    """

    def __init__(self, model: Any) -> None:
        from transformers import modeling_outputs

        self.model = model
        self._original = attributes(model)
        self._output = getattr(modeling_outputs, family_of(model.config.model_type).output)
        self._form: _Form | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_form": None}  # pointers are neither copied nor pickled

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

    def _ready(self, gpu: bool) -> CpuStep | GpuStep | None:
        """The native form of the model in its current state."""
        if self._form is None or self._form.gpu != gpu or not self._form.is_current():
            self._form = _Form(self.model, gpu, self._original)
        return self._form.usable()

    def _ahead(self, gpu: bool) -> GpuStep | None:
        """The form of the last step, if that was on a GPU: nobody has looked at the model since."""
        form = self._form
        return form.step if gpu and form is not None and form.gpu and isinstance(form.step, GpuStep) else None

    def gpu_step(self) -> GpuStep | None:
        """The native form of the model on a GPU in its current state, if it has one."""
        step = self._ready(gpu=True)
        return step if isinstance(step, GpuStep) else None

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
        gpu = input_ids is not None and cuda_tiles.on_gpu(input_ids)
        if input_ids is not None and not gpu and input_ids.device.type != "cpu":
            self._form = None  # lets go of what the model had where it was
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
        if not gpu and activations() == "float":
            return None
        model = self.model
        if _requests_extra_outputs(model.config, options) or _is_watched(input_ids.device):
            return None

        from dbrx_quant.runtime.step.kv_cache import layers_of_kind, same_length

        ahead = self._ahead(gpu)
        step = ahead or self._ready(gpu)
        layers = None if step is None else layers_of_kind(held, step.layers, step.layer_kind())
        past = None if layers is None else same_length(layers)
        sequences, tokens = input_ids.shape
        if (
            step is None
            or layers is None
            or past is None
            or not _is_continuation(attention_mask, position_ids, sequences, tokens, past)
        ):
            return None
        states = step.run(input_ids, layers, past)
        if (
            ahead is not None and self._ready(gpu) is not ahead
        ):  # the model has changed: all of that for nothing
            step = self._ready(gpu)
            states = None if step is None else step.run(input_ids, layers, past)
        if states is not None:
            for layer in layers:
                layer.advance(tokens)
        return states


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


def _is_watched(device: torch.device) -> bool:
    """Whether somebody records what torch computes: autocast, tracing, or the capture of a CUDA graph."""
    return (
        torch.is_autocast_enabled(device.type)
        or torch._C._get_tracing_state() is not None
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _is_continuation(
    mask: Tensor | None, positions: Tensor | None, sequences: int, tokens: int, past: int
) -> bool:
    """Whether mask and positions just append `tokens` new tokens after `past`, in every sequence.

    On a GPU that waits for the numbers, once.
    """
    if mask is not None and mask.shape != (sequences, past + tokens):
        return False
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != tokens):
        return False
    found = [] if mask is None else [mask.all()]
    if positions is not None:
        expected = torch.arange(past, past + tokens, device=positions.device)
        found.append((positions == expected).all())
    return not found or bool(found[0].logical_and(found[-1]))


def install_native_step(model: Any) -> None:
    """Let a loaded causal language model take native steps where it can."""
    decoder = model.base_model
    if decoder is not model and layer_parts(decoder) is not None:
        decoder.forward = NativeForward(decoder)
