"""Several tokens of a model on a GPU without the host between them."""

from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.families.parts import is_quant_linear
from dbrx_quant.runtime.kernels import cuda_tiles
from dbrx_quant.runtime.step.native_step import NativeForward, native_step_enabled
from dbrx_quant.runtime.step.sampling import Sampling


@torch.no_grad()
def run_ahead(
    model: Any, ids: Tensor, cache: Any, count: int, sampling: Sampling | None = None
) -> Tensor | None:
    """The `count` tokens that follow `ids` in each sequence, int64 [B, count]; None: not natively.

    Each step chooses the next one's tokens on the device, where `generate` would bring logits back to Python.
    Afterwards `cache` has `count` positions more: `ids`, and all tokens but the last. Greedy tokens are those
    of `generate(do_sample=False)`, but for ties within the rounding of the logits.

    Args:
        model: a causal language model, loaded to a GPU.
        ids: the last token of each of up to 8 sequences, [B, 1], which `cache` does not have yet.
        cache: a `DynamicCache` with what came before, of equal length in all sequences and without padding.
        count: tokens wanted.
        sampling: how they are chosen. Default: the likeliest.

    Raises:
        ValueError: `ids` is not [1..8, 1], or `count` is below 1.
    """
    if ids.dim() != 2 or ids.shape[1] != 1 or not 1 <= ids.shape[0] <= 8 or count < 1:
        raise ValueError(
            f"run_ahead: ids {tuple(ids.shape)}, count {count}; expected [1..8, 1] and 1 or more"
        )
    forward, head = model.base_model.forward, model.get_output_embeddings()
    if not isinstance(forward, NativeForward) or not native_step_enabled() or not cuda_tiles.on_gpu(ids):
        return None
    step = forward.gpu_step()
    if step is None or not is_quant_linear(head) or "forward" in vars(head) or head._forward_hooks:
        return None

    from dbrx_quant.runtime.step.kv_cache import layers_of_kind, same_length

    layers = layers_of_kind(cache, step.layers, step.layer_kind())
    past = None if layers is None else same_length(layers)
    if layers is None or past is None:
        return None
    tokens = step.run_ahead(ids, layers, past, head, sampling or Sampling(), count)
    if tokens is not None:
        for layer in layers:
            layer.advance(count)
    return tokens
