"""How far a quantized model is from its original: perplexity, KL divergence, top-1 and router agreement.

Protocol: text joined as is, tokenised once without special tokens, the first N windows of L tokens, no
overlap; logits and their logarithms in fp32, sums in fp64.

    ppl       exp of the mean negative log-likelihood of the L - 1 predicted tokens of each window
    kl        mean over all N·L positions of KL(original ‖ quantized), in nats
    top1      share of the positions where both models find the same token most likely
    router    share of the positions where both models choose the same set of experts, for each block

The original is run beside the candidate, window by window, or is a function that has its outputs already
(`calibration/blocks/original.py`), or its log-probabilities are read from a folder that `cache_reference`
filled before.

Axes: L tokens of a window, V vocabulary, A active experts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dbrx_quant.runtime.files.atomic import save_tensors
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.sealed import seal, seal_fault
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.kernels.float_matmul import fast_products
from dbrx_quant.runtime.tokenizer.load import load_tokenizer


class Outputs(NamedTuple):
    """What a model makes of a window."""

    logits: Tensor  # [L, V]
    choices: tuple[Tensor, ...]  # a block with experts each: [L, A] chosen ones, ascending


LogitsFunction = Callable[[Tensor], Tensor | Outputs]  # ids [L] int64 → logits [L, V]; routing, if known
Progress = Callable[[int, int], None]  # windows done, windows in all

_CHUNK = (
    64  # positions whose log-probabilities of both models are in memory in fp32: 26 MB each at V = 100352
)


@dataclass(frozen=True)
class Scores:
    """Distances over `positions` = N·L tokens; see the head of the module for the terms."""

    ppl: float | None  # None: beyond what a float holds, at losses of more than 709 nats a token
    reference_ppl: float | None
    kl: float  # nats
    kl_stderr: float | None  # standard error over the windows' means; None: a single window has none
    top1: float
    router_topk: tuple[float, ...] | None  # a share for each block with experts; None: there are none
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class ReferenceCache:
    """A folder with the original's log-probabilities and routing, one file per window."""

    folder: Path


@dataclass(frozen=True)
class _Window:
    """The outputs of one model on one window."""

    logits: Tensor  # [L, V], on the model's device; up to a constant for each position
    top: Tensor  # [L] the most likely token, before any rounding of the logits
    choices: tuple[Tensor, ...] | None  # a block each: [L, A] chosen experts, ascending; None: not known


def windows(
    tokenizer_folder: str | Path, text_path: str | Path, count: int = 40, length: int = 512
) -> Tensor:
    """The first `count` windows of `length` tokens of a text, int64 [count, length].

    Raises:
        ValueError: the text holds fewer windows.
        CheckpointError: the folder has no readable tokenizer, or the text is not UTF-8.
    """
    try:
        text = Path(text_path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{text_path}: not UTF-8 at byte {error.start}") from error
    tokenizer = load_tokenizer(tokenizer_folder)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if count < 1 or length < 2:
        raise ValueError(f"expected at least one window of two tokens, got {count} windows of {length}")
    if len(ids) < count * length:
        raise ValueError(
            f"{text_path}: {len(ids)} tokens hold {len(ids) // length} windows of {length}, {count} requested"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


@fast_products()
@use_activations("float")  # judge the weights, not the kernels that run them
def evaluate(
    candidate: nn.Module | LogitsFunction,
    reference: nn.Module | LogitsFunction | ReferenceCache,
    rows: Tensor,
    progress: Progress | None = None,
) -> Scores:
    """Score `candidate` against `reference` on windows of tokens.

    Args:
        candidate: a transformers causal LM in the precision to be judged (fp32 to follow the protocol), or a
            function from ids [L] to logits [L, V], or to `Outputs`, without which routing is not compared.
        reference: the original, likewise, or the cache of its log-probabilities on the same windows.
        rows: ids [N, L] int64.
        progress: called after each window with the windows done and their number.

    Raises:
        ValueError: the models' vocabularies or blocks with experts differ, a logit or the divergence is not
            finite, or windows have one token.
        CheckpointError: the cache is missing, broken, or of other windows.
    """
    count, length = rows.shape
    if length < 2:
        raise ValueError(f"windows of {length} token: nothing is predicted in them; give two tokens at least")
    losses = torch.zeros(2, dtype=torch.float64)
    kl = torch.zeros(count, dtype=torch.float64)
    agreeing = 0
    routed: list[int] | None = None
    for i, row in enumerate(rows):
        if isinstance(reference, ReferenceCache):
            original = _read_window(reference.folder, i, row)
        else:
            original = _run(reference, row, f"original, window {i}")
        quantized = _run(candidate, row, f"quantized model, window {i}")
        if quantized.logits.shape != original.logits.shape:
            ours, theirs = quantized.logits.shape[1], original.logits.shape[1]
            raise ValueError(
                f"vocabulary of {ours} tokens against the original's {theirs}: not the same model"
            )
        window_losses, window_kl = _compare(original.logits, quantized.logits, row)
        if not math.isfinite(window_kl):
            raise ValueError(f"window {i}: logits too far apart for a KL divergence; a model is broken")
        losses += window_losses
        kl[i] = window_kl
        agreeing += int((original.top == quantized.top.to(original.top.device)).sum())
        if original.choices is not None and quantized.choices is not None:
            same = _equal_sets(original.choices, quantized.choices)
            routed = [a + b for a, b in zip(routed or [0] * len(same), same, strict=True)]
        if progress is not None:
            progress(i + 1, count)
    positions = count * length
    mean_losses = (losses / (count * (length - 1))).tolist()
    return Scores(
        ppl=_perplexity(mean_losses[1]),
        reference_ppl=_perplexity(mean_losses[0]),
        kl=kl.sum().item() / positions,
        kl_stderr=(kl / length).std().item() / math.sqrt(count) if count > 1 else None,
        top1=agreeing / positions,
        router_topk=tuple(equal / positions for equal in routed) if routed else None,
        positions=positions,
    )


def cache_reference(
    model: nn.Module | LogitsFunction,
    rows: Tensor,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    original: str = "",
) -> ReferenceCache:
    """Run the original over the windows and store what `evaluate` needs.

    N·L·V elements on disk (fp32, N = 40, L = 512, V = 100352: 8.2 GB; fp16 half of that, which moved a KL of
    0.000759 by 6e-7, since log-probabilities are normalised again when they are read). A window that is there
    already for the same ids, sound, is not computed again; one folder is for one model.

    Args:
        model: the original, as in `evaluate`.
        rows: ids [N, L] int64.
        folder: of the cache.
        dtype: of what is kept, fp32 or fp16.
        progress: called after each window with the windows done and their number.
        original: tells the original from others, if given.

    Raises:
        ValueError: `dtype` is neither fp32 nor fp16, or a logit is not finite.
        CheckpointError: the folder holds other windows, or those of another original.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = set(missing_windows(rows, folder, dtype, original))
    for i, row in enumerate(rows):
        if i in missing:
            _store_window(folder, i, row, _run(model, row, f"original, window {i}"), dtype, original)
        if progress is not None:
            progress(i + 1, len(rows))
    return ReferenceCache(folder)


def missing_windows(
    rows: Tensor, folder: str | Path, dtype: torch.dtype = torch.float32, original: str = ""
) -> list[int]:
    """The windows that a cache does not hold yet; damaged ones are removed. See `cache_reference`."""
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"log-probabilities are kept in float32 or float16, not {dtype}")
    missing, folder = [], Path(folder)
    for i, row in enumerate(rows):
        path = _window_path(folder, i)
        if path.is_file() and seal_fault(path):
            path.unlink()  # computed again
        if not path.is_file() or _read_window(folder, i, row, original).logits.dtype != dtype:
            missing.append(i)
    return missing


def _store_window(
    folder: Path, i: int, row: Tensor, window: _Window, dtype: torch.dtype, original: str
) -> None:
    logits = window.logits.float()
    log_probs = (logits - logits.logsumexp(-1, keepdim=True)).to(dtype)
    tensors = {"log_probs": log_probs, "top": window.top}
    for block, choices in enumerate(window.choices or ()):
        tensors[f"choices.{block}"] = choices.to(torch.int16)
    blocks = "none" if window.choices is None else str(len(window.choices))
    path = _window_path(folder, i)
    save_tensors(path, tensors, {"ids": _hash(row), "blocks": blocks, "original": original})
    seal(path)


def _perplexity(loss: float) -> float | None:
    try:
        value = math.exp(loss)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _compare(original: Tensor, quantized: Tensor, row: Tensor) -> tuple[Tensor, float]:
    """([negative log-likelihood of original, of quantized], KL), each summed over a window."""
    losses = torch.zeros(2, dtype=torch.float64)
    kl = 0.0
    following = row[1:]
    for start in range(0, len(row), _CHUNK):
        stop = min(start + _CHUNK, len(row))
        p = torch.log_softmax(original[start:stop].float(), -1)  # [chunk, V]
        q = torch.log_softmax(quantized[start:stop].to(p.device).float(), -1)
        kl += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        targets = following[start:stop, None].to(p.device)
        for k, log_probs in enumerate((p, q)):
            losses[k] -= log_probs[: len(targets)].gather(-1, targets).sum(dtype=torch.float64).cpu()
    return losses, kl


@torch.inference_mode()
def _run(model: nn.Module | LogitsFunction, row: Tensor, what: str) -> _Window:
    noted: tuple[Tensor, ...] | None
    if isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with _routing(model) as choices:
            logits = model(row[None].to(device)).logits[0]
        noted = tuple(choices[block] for block in sorted(choices))
    else:
        made = model(row)
        logits, noted = (made.logits, made.choices) if isinstance(made, Outputs) else (made, None)
    if logits.dim() != 2 or logits.shape[0] != len(row):
        raise ValueError(f"{what}: expected logits of shape [{len(row)}, V], got {list(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError(f"{what}: logits are not finite; the model is broken or its dtype is too narrow")
    return _Window(logits, logits.argmax(-1), noted)


@contextmanager
def _routing(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Record the experts that each block chooses while the model runs: block → [L, A], ascending.

    Routers are found by class name and by what they return, as of transformers 5: DBRX's gives logits [L, E],
    of which the ffn around it takes its `top_k`; the others give (logits, scores, indices).
    """
    noted: dict[int, Tensor] = {}
    hooks = []
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    for block, router in enumerate(routers):

        def hook(module: nn.Module, _: Any, output: Any, block: int = block) -> None:
            if isinstance(output, tuple):
                chosen = next((part for part in output[::-1] if not part.is_floating_point()), None)
            else:
                top_k = getattr(parents.get(module), "top_k", None)
                chosen = output.topk(top_k, dim=-1).indices if isinstance(top_k, int) else None
            if chosen is None:
                kind = type(module).__name__
                raise ValueError(f"{kind}: no expert indices in its output, no top_k in the module around it")
            noted[block] = chosen.reshape(-1, chosen.shape[-1]).sort(-1).values.cpu()

        hooks.append(router.register_forward_hook(hook))
    try:
        yield noted
    finally:
        for handle in hooks:
            handle.remove()


def _equal_sets(original: tuple[Tensor, ...], quantized: tuple[Tensor, ...]) -> list[int]:
    if [part.shape for part in original] != [part.shape for part in quantized]:
        ours, theirs = len(quantized), len(original)
        raise ValueError(f"{ours} blocks with experts against the original's {theirs}, or another top-k")
    return [int((a == b).all(-1).sum()) for a, b in zip(original, quantized, strict=True)]


def _window_path(folder: Path, i: int) -> Path:
    return folder / f"window-{i:05d}.safetensors"


def _hash(row: Tensor) -> str:
    return hashlib.sha256(json.dumps(row.tolist()).encode()).hexdigest()[:32]


def _read_window(folder: Path, i: int, row: Tensor, original: str = "") -> _Window:
    from safetensors import SafetensorError, safe_open

    path = _window_path(folder, i)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; the cache of the original holds fewer than {i + 1} windows"
        )
    if fault := seal_fault(path):
        raise CheckpointError(f"{path}: {fault}; fill the cache again from the original")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if metadata.get("ids") != _hash(row):
        raise CheckpointError(f"{path}: made from another text or another window length; use another folder")
    if original and metadata.get("original", "") not in ("", original):
        raise CheckpointError(f"{path}: made from another original; use another folder")
    blocks = metadata.get("blocks", "")
    names = [f"choices.{block}" for block in range(int(blocks))] if blocks.isdecimal() else []
    missing = [name for name in ["log_probs", "top", *names] if name not in tensors]
    if missing:
        raise CheckpointError(f"{path}: tensor {missing[0]} is missing; delete the file")
    choices = tuple(tensors[name].to(torch.int64) for name in names) if blocks.isdecimal() else None
    return _Window(tensors["log_probs"], tensors["top"], choices)
