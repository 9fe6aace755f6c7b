"""How fast a DBRX of true shapes decodes on a GPU: one block with random weights stands in for all forty.

The steps of a token are those of the whole model: every layer reads the block's weights again, and they are
larger than any L2. Greedy tokens of the native step are held against transformers' own code.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.step.native_step import install_native_step, use_native_step
from dbrx_quant.runtime.step.run_ahead import run_ahead
from dbrx_quant.scripts.full_size.make_quantized import write_folder

BLOCKS, BITS, PROMPT, NEW = 40, 3.0, 16, 32
SEQUENCES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one way to decode.

    Attributes:
        way: which.
        sequences: decoded together.
        tokens_a_second: of all of them.
        bytes_a_second: of packed weights that steps read, with `sequences` 1 only.
        equal: the share of tokens that are those of transformers' own code.
    """

    way: str
    sequences: int
    tokens_a_second: float
    bytes_a_second: float | None
    equal: float


def repeated(model: Any, count: int) -> Any:
    """A loaded model whose only layer is now `count` layers that share its weights.

    Args:
        model: a causal language model of one layer; it is changed.
        count: of layers.
    """
    decoder = model.base_model
    (layers,) = (child for child in decoder.children() if isinstance(child, torch.nn.ModuleList))
    (layer,) = layers
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    for index in range(1, count):
        twin = copy.deepcopy(layer, dict(shared))
        for module in twin.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (no attribute that types know of)
        layers.append(twin)
    model.config.num_hidden_layers = count
    del decoder.forward  # the native step knows the model as it was loaded
    install_native_step(model)
    return model


def active_bytes(model: Any) -> int:
    """Packed bytes that one token of one sequence reads: of a mixture the active experts' share."""
    experts, total = describe(model.config).blocks[0].experts, 0
    assert experts is not None
    share = experts.active / experts.count
    for name, tensor in model.named_buffers(remove_duplicate=False):
        if name.endswith(("q_weight", "q_scale", "q_scale_max")):
            total += int(tensor.nbytes * (share if ".experts." in name else 1))
    return total


@torch.no_grad()
def speeds(model: Any, sequences: tuple[int, ...] = SEQUENCES, new: int = NEW) -> list[Speed]:
    """Tokens a second by transformers' own code, by native steps under `generate`, and by steps run ahead.

    Args:
        model: loaded, on the device.
        sequences: numbers of them to decode together.
        new: tokens of each.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    read = active_bytes(model)
    for count in sequences:
        drawn = torch.randint(0, model.config.vocab_size, (count, PROMPT), generator=generator)
        prompt = drawn.to(model.device)
        plain, native = (_timed(partial(_generated, model, prompt, new, on)) for on in (False, True))
        ways = [("transformers", *plain), ("native step", *native)]
        ahead = _timed(partial(_ahead, model, prompt, new))
        if ahead[1] is not None:
            ways.append(("run ahead", *ahead))
        for way, seconds, tokens in ways:
            rate = count * new / seconds
            equal = float((tokens == plain[1]).double().mean())
            rows.append(Speed(way, count, rate, read * rate if count == 1 else None, equal))
    return rows


def _generated(model: Any, prompt: Tensor, new: int, native: bool) -> Tensor:
    with use_native_step(native):
        made: Tensor = model.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return made[:, prompt.shape[1] :]


def _ahead(model: Any, prompt: Tensor, new: int) -> Tensor | None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with use_native_step(False):
        first = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    rest = run_ahead(model, first, cache, new - 1)
    return None if rest is None else torch.cat([first, rest], dim=1)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call that has been made before, and its result."""
    call()
    _wait()
    started = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - started, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def figures(device: str, folder: Path) -> list[dict[str, Any]]:
    """The speeds of 40 layers at DBRX's shapes.

    Args:
        device: where.
        folder: for a GB of files.
    """
    write_folder(folder, 1, 16, BITS, 100352)
    model = repeated(load_model(folder, device=device), BLOCKS)
    return [asdict(row) for row in speeds(model)]


def print_figures(rows: list[dict[str, Any]], bandwidth: float) -> None:
    """A table, with the share of a copy's bandwidth."""
    for row in rows:
        rate = row["bytes_a_second"]
        read = "" if rate is None else f" {rate / 1e9:>7.0f} GB/s {rate / bandwidth:>5.0%} of a copy"
        print(
            f"{row['way']:<13} {row['sequences']:>2} sequences {row['tokens_a_second']:>8.1f} tokens/s, "
            f"{row['equal']:>4.0%} of the tokens as transformers'{read}"
        )
