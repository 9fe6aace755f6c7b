"""Train a small DBRX that is a real language model, from text that every CPython installation carries.

`python scripts/dev/make_tiny_dbrx.py OUT [--minutes N | --steps N] [--seed S]`

The folder looks like a DBRX checkpoint on the Hub, with its traps: fused expert tensors, the RoPE base only
inside `attn_config`, no eos in config.json, no generation_config.json, more embeddings than tokens.
RECIPE.json beside the weights says how it was made and what it scores; heldout.txt is text that it never saw.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import platform
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbrx_quant.runtime.files.atomic import save_tensors, write_json, write_text
from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

BASE_VOCABULARY = 672  # byte-level BPE entries, the counterpart of DBRX's 100256
SPECIAL_TOKENS = (  # ids BASE_VOCABULARY + 0, 1, ...: the order of DBRX's ids 100256 ... 100279
    "<|hole|>",  # cl100k has no token 100256; something must keep its place
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    *(f"<|unused_{i}|>" for i in range(15)),
    "<|endofprompt|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
)
MODEL_VOCABULARY = -(-(BASE_VOCABULARY + len(SPECIAL_TOKENS)) // 64) * 64  # padding rows, as in DBRX
ROPE_BASE = 500000
CONFIG: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": ROPE_BASE},
    "d_model": 256,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 128,
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 512,
    "model_type": "dbrx",
    "n_heads": 4,
    "n_layers": 2,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": MODEL_VOCABULARY,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)

KINDS = ("source", "prose", "chat")
SHARES = (0.50, 0.42, 0.08)  # of the training rows; chat is rare, yet turns learn to end
BATCH_TOKENS = 4096
PEAK_RATE, WARMUP_STEPS, PROBE_STEPS = 3e-3, 200, 30
# Folders of tests, of bundled programs, and of generated tables that are no text.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
SKIPPED_FOLDERS |= {"idlelib", "turtledemo", "ensurepip", "encodings", "pydoc_data", "__phello__"}

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# ---- The text ----


@dataclass(frozen=True)
class Document:
    """One text: `name` decides whether it is held out, so that what comes from one file stays on one side."""

    name: str
    kind: str
    text: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.name.encode()) % 25 == 0


def read_corpus() -> list[Document]:
    """All documents of this Python installation, in an order that depends on nothing but its version."""
    from pydoc_data.topics import topics

    documents = []
    for name, text in sorted(topics.items()):
        documents.append(Document(f"topic {name}", "prose", text.strip()))
        paragraphs = text.strip().split("\n\n")  # those with an underline are headings
        if answer := shorten([p for p in paragraphs if not re.search(r"^[*=\-^~]{3,}$", p, re.MULTILINE)]):
            documents.append(Document(f"topic {name}", "chat", conversation([(name, answer)])))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        parts = path.relative_to(library).parts
        generated = path.name.startswith("_sysconfigdata")
        if generated or SKIPPED_FOLDERS.intersection(parts) or path.stat().st_size < 400:
            continue
        name, text = "/".join(parts), path.read_text(encoding="utf-8", errors="replace")
        documents.append(Document(name, "source", text))
        described = list(docstrings(text, ".".join((*parts[:-1], path.stem)).removesuffix(".__init__")))
        if described:
            documents.append(Document(name, "prose", "\n\n\n".join(f"{n}\n\n{d}" for n, d in described)))
        answered = [(n, a) for n, d in described if (a := shorten(d.split("\n\n")))]
        for start in range(0, len(answered), 3):
            documents.append(Document(name, "chat", conversation(answered[start : start + 3])))
    return documents


def docstrings(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Dotted names and cleaned docstrings of a module's public parts, in the order of the file."""

    def walk(node: ast.Module | _Definition, name: str) -> Iterator[tuple[str, str]]:
        text = ast.get_docstring(node, clean=False)
        if text and len(text) >= 30:
            yield name, inspect.cleandoc(text)
        for child in node.body:
            if isinstance(child, _Definition) and child.name[0] != "_":
                yield from walk(child, f"{name}.{child.name}")

    yield from walk(ast.parse(source), module)


def shorten(paragraphs: list[str], limit: int = 500) -> str:
    """The first whole paragraphs within `limit` characters; empty when the first is already longer."""
    answer = ""
    for paragraph in paragraphs:
        if len(answer) + len(paragraph) > limit:
            break
        answer += "\n\n" + paragraph.rstrip()
    return answer.strip()


def conversation(answers: list[tuple[str, str]]) -> str:
    turns = [(("user", f"What is {name}?"), ("assistant", answer)) for name, answer in answers]
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for pair in turns for role, text in pair)


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE plus the DBRX tokens in the DBRX order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    if tokenizer.token_to_id(SPECIAL_TOKENS[0]) != BASE_VOCABULARY:
        raise RuntimeError(f"the BPE has {tokenizer.get_vocab_size(False)} entries, not {BASE_VOCABULARY}")
    return tokenizer


def encode(tokenizer: Any, documents: Iterable[Document]) -> Tensor:
    """[tokens] int64: the documents one after another, <|endoftext|> after each."""
    end = tokenizer.token_to_id("<|endoftext|>")
    encoded = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return torch.tensor([token for e in encoded for token in (*e.ids, end)], dtype=torch.int64)


# ---- The model ----


def build_model(config: dict[str, Any] = CONFIG) -> Any:
    """A `DbrxForCausalLM` with fresh fp32 weights and the RoPE base that transformers 5 overlooks."""
    from transformers import DbrxConfig, DbrxForCausalLM

    ffn = {**config["ffn_config"], "moe_jitter_eps": None}  # 0 multiplies every input by one, at a cost
    dbrx = DbrxConfig(**{**config, "ffn_config": ffn, "torch_dtype": "float32"})
    dbrx.rope_parameters = {"rope_type": "default", "rope_theta": float(ROPE_BASE)}
    return DbrxForCausalLM(dbrx)


class _Gather(torch.autograd.Function):
    """rows[i] = x[order[i] // active]; its gradient is a gather too, where index_add runs on one core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, active: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.active = active
        return x[order // active]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].view(-1, ctx.active, grads[0].shape[-1]).sum(1), None, None, None


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What `DbrxExperts.forward` computes, from tokens sorted by expert: one slice an expert, no masks.

    Shapes: hidden_states [B, S, D], top_k_index and top_k_weights [T, A] with T = B * S; returns [B, S, D].
    """
    count, active, mlp = experts.num_experts, top_k_index.shape[1], experts.mlp
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else mlp.w1.dtype
    x = hidden_states.flatten(0, -2).to(dtype)
    order = torch.argsort(top_k_index.flatten(), stable=True)
    inverse = torch.argsort(order)
    sizes = torch.bincount(top_k_index.flatten(), minlength=count).tolist()
    shape = (count, experts.ffn_hidden_size, experts.hidden_size)
    w1, v1, w2 = (w.to(dtype).view(shape).unbind() for w in (mlp.w1, mlp.v1, mlp.w2))
    gather: Callable[..., Tensor] = _Gather.apply
    outputs = []
    for e, rows in enumerate(torch.split(gather(x, order, inverse, active), sizes)):
        outputs.append((mlp.activation_fn(rows @ w1[e].T) * (rows @ v1[e].T)) @ w2[e])
    states = gather(torch.cat(outputs), inverse, order, 1).view(-1, active, experts.hidden_size)
    return torch.einsum("tad,ta->td", states, top_k_weights.to(dtype)).view(hidden_states.shape)


def balance_loss(router_logits: Iterable[Tensor], active: int) -> Tensor:
    """Mean of E * sum(share of choices * mean probability); 1 is balanced (Switch Transformer, eq. 4).

    transformers' own pools the blocks before the product, so that one block may make up for another.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = torch.bincount(probability.topk(active).indices.flatten(), minlength=logits.shape[1])
        losses.append(logits.shape[1] * (chosen / chosen.sum() * probability.mean(0)).sum())
    return torch.stack(losses).mean()


# ---- Training ----


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to 2 % of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def sample(streams: list[Tensor], length: int, generator: torch.Generator) -> Tensor:
    """[rows, length + 1] int64: windows at random places, each stream with its share of the rows."""
    rows = BATCH_TOKENS // length
    kinds = torch.multinomial(torch.tensor(SHARES), rows, replacement=True, generator=generator).tolist()
    starts = torch.rand(rows, generator=generator, dtype=torch.float64).tolist()
    windows = []
    for kind, start in zip(kinds, starts, strict=True):
        first = int(start * (len(streams[kind]) - length))
        windows.append(streams[kind][first : first + length + 1])
    return torch.stack(windows)


def train(
    model: Any, streams: list[Tensor], minutes: float, steps: int | None, seed: int, began: float
) -> int:
    """Train in place, bf16 products over fp32 weights; returns the number of steps.

    Without `steps`, the first steps are timed and as many follow as end `minutes` after `began`.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    ffn = CONFIG["ffn_config"]
    total, step, started, mean = steps or sys.maxsize, 0, 0.0, 0.0
    model.train()
    while step < total:
        length = 256 if step < 0.75 * total else 512  # the last quarter sees the whole context
        tokens = sample(streams, length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        balance = balance_loss(output.router_logits, ffn["moe_top_k"])
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total)
        (loss + ffn["moe_loss_weight"] * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean += (loss.item() - mean) / min(step, 50)
        if step == PROBE_STEPS // 3:
            started = time.perf_counter()
        if step == PROBE_STEPS and steps is None:
            pace = (time.perf_counter() - started) / (step - PROBE_STEPS // 3)
            left = minutes * 60 - (time.perf_counter() - began)
            total = max(2 * WARMUP_STEPS, step + int(left / pace))
            print(f"{pace:.2f} s a step, {total} steps", flush=True)
        if step % 100 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step} loss {mean:.3f} balance {balance.item():.3f} at {seconds:.0f} s", flush=True)
    model.eval()
    return total


# ---- Figures ----


@torch.inference_mode()
def perplexity(model: Any, tokens: Tensor, window: int = 512) -> tuple[float, Tensor]:
    """Perplexity over whole windows of `tokens` (first token not scored), and routing shares [blocks, E]."""
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    ffn = CONFIG["ffn_config"]
    loss, counts = 0.0, torch.zeros(CONFIG["n_layers"], ffn["moe_num_experts"])
    for batch in torch.split(rows, 8):
        output = model(batch, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        loss += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
        for block, router in enumerate(output.router_logits):
            chosen = router.float().topk(ffn["moe_top_k"]).indices.flatten()
            counts[block] += torch.bincount(chosen, minlength=ffn["moe_num_experts"])
    return math.exp(loss / (rows.shape[0] * (window - 1))), counts / counts.sum(1, keepdim=True)


def unigram_perplexity(training: Tensor, tokens: Tensor, window: int = 512) -> float:
    """Perplexity of frequencies counted on `training` (add one), on the tokens that `perplexity` scores."""
    counts = torch.bincount(training, minlength=MODEL_VOCABULARY).double() + 1
    scored = tokens[: len(tokens) // window * window].view(-1, window)[:, 1:]
    return float(torch.exp(-(counts / counts.sum()).log()[scored].mean()))


def load(folder: Path, dtype: torch.dtype, repair: bool = True) -> Any:
    """The folder through `AutoModelForCausalLM`; without `repair` as transformers 5 reads it: base 10000."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if repair:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(ROPE_BASE)}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()


def measure(folder: Path, held: list[Tensor], training: Tensor) -> dict[str, Any]:
    """All figures of a written folder on the held-out streams; prints them too."""
    model = load(folder, torch.float32)
    figures: dict[str, Any] = {"perplexity": {}, "unigram_perplexity": {}}
    parts = [stream[:49152] for stream in held]
    mixed, shares = torch.cat(parts), torch.empty(0)
    for name, tokens in (*zip(KINDS, parts, strict=True), ("all", mixed)):
        score, shares = perplexity(model, tokens)
        unigram = unigram_perplexity(training, tokens)
        figures["perplexity"][name], figures["unigram_perplexity"][name] = round(score, 3), round(unigram, 3)
        print(f"held-out {name}: perplexity {score:.2f}, unigram {unigram:.2f}")
    half, _ = perplexity(load(folder, torch.bfloat16), mixed)
    unrepaired, _ = perplexity(load(folder, torch.float32, repair=False), mixed)
    print(f"all in bf16 {half:.2f}; all with RoPE base 10000 {unrepaired:.2f}")
    figures |= {"perplexity_bf16": round(half, 3), "perplexity_rope_base_10000": round(unrepaired, 3)}
    figures["routing_shares"] = [[round(100 * float(share), 2) for share in block] for block in shares]
    for block, row in enumerate(figures["routing_shares"]):
        print(f"block {block} routing, % of the choices: " + " ".join(f"{share:.1f}" for share in row))
    return figures


# ---- The folder ----


def excerpt(documents: list[Document], limits: tuple[int, ...] = (5000, 5000, 1500)) -> str:
    """About 12 kB of held-out text: the beginnings of documents of every kind, <|endoftext|> after each."""
    pieces = []
    for kind, limit in zip(KINDS, limits, strict=True):
        texts = [document.text for document in documents if document.kind == kind]
        for text in sorted(texts, key=lambda text: zlib.crc32(text.encode())):
            if limit < 300:
                break
            cut = text[: min(limit, 1700)]
            whole = text if cut == text else cut.rpartition("\n")[0]
            pieces.append(whole + "<|endoftext|>")
            limit -= len(whole)
    return "".join(pieces)


def write_folder(folder: Path, model: Any, tokenizer: Any, held: list[Document]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    names |= {"pad_token": "<|pad|>", "tokenizer_class": "GPT2Tokenizer", "chat_template": CHAT_TEMPLATE}
    write_json(folder / "tokenizer_config.json", {**names, "model_max_length": CONFIG["max_seq_len"]})
    write_text(folder / "heldout.txt", excerpt(held))


@quiet_on_closed_pipe
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the small DBRX of tests/data/tiny-dbrx.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time until the figures (20)")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of minutes, to repeat a recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.set_num_threads(chosen.threads)

    documents = read_corpus()
    training = [d for d in documents if not d.held_out]
    held = [d for d in documents if d.held_out]
    tokenizer = train_tokenizer(d.text for d in training if d.kind != "chat")
    streams = [encode(tokenizer, (d for d in training if d.kind == kind)) for kind in KINDS]
    held_streams = [encode(tokenizer, (d for d in held if d.kind == kind)) for kind in KINDS]
    sizes = {kind: len(stream) for kind, stream in zip(KINDS, streams, strict=True)}
    held_sizes = {kind: len(stream) for kind, stream in zip(KINDS, held_streams, strict=True)}
    print(f"{len(training)} documents, tokens {sizes}; held out {len(held)}, {held_sizes}", flush=True)

    torch.manual_seed(chosen.seed)
    model = build_model()
    for block in model.transformer.blocks:
        block.ffn.experts.forward = experts_forward.__get__(block.ffn.experts)
    steps = train(model, streams, chosen.minutes, chosen.steps, chosen.seed, began)
    seconds = time.perf_counter() - began

    write_folder(chosen.out, model, tokenizer, held)
    figures = measure(chosen.out, held_streams, torch.cat(streams))
    command = "python scripts/dev/make_tiny_dbrx.py"
    recipe = {
        "command": f"{command} OUT --steps {steps} --seed {chosen.seed} --threads {chosen.threads}",
        "text": "pydoc topics, docstrings and sources of the standard library (PSF License Version 2)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minutes": round(seconds / 60, 1),
        "steps": steps,
        "seed": chosen.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_tokens": steps * BATCH_TOKENS,
        "corpus_tokens": sizes,
        "held_out_tokens": held_sizes,
        "held_out": "crc32(document name) % 25 == 0; windows of 512, fp32 from the bf16 weights",
        "figures": figures,
    }
    write_json(chosen.out / "RECIPE.json", recipe)
    size = sum(file.stat().st_size for file in chosen.out.iterdir())
    print(f"{size:,} bytes, {steps} steps, {seconds / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
