"""Scores against a plain fp64 reading of the protocol, routing of each family, the cache of the original."""

import math

import pytest
import safetensors.torch
import torch
from byte_tokenizer import write_tokenizer
from small_configs import CONFIGS
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime.evaluation.scores import Scores, cache_reference, evaluate, windows
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.sealed import seal

V = 50


def tables(seed, count=3, length=70):
    """Rows, and two models that look their logits up: ids are the key, so that every window has its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, V, (count, length), generator=generator)
    original = torch.randn(count, length, V, generator=generator) * 3
    quantized = original + torch.randn(count, length, V, generator=generator)

    def model(table):
        return lambda row: table[(rows == row).all(1).nonzero().item()]

    return rows, original, quantized, model


def oracle(rows, original, quantized):
    """The protocol, position by position, in Python floats."""
    kl_windows, losses, top = [], [[], []], []
    for row, p_logits, q_logits in zip(rows.tolist(), original.double(), quantized.double(), strict=True):
        kl = []
        for t in range(len(row)):
            logs = []
            for logits in (p_logits[t], q_logits[t]):
                total = math.log(sum(math.exp(x) for x in logits.tolist()))
                logs.append([x - total for x in logits.tolist()])
            kl.append(sum(math.exp(p) * (p - q) for p, q in zip(*logs, strict=True)))
            top.append(p_logits[t].argmax() == q_logits[t].argmax())
            if t + 1 < len(row):
                for k in (0, 1):
                    losses[k].append(-logs[k][row[t + 1]])
        kl_windows.append(sum(kl) / len(kl))
    mean = sum(kl_windows) / len(kl_windows)
    variance = sum((x - mean) ** 2 for x in kl_windows) / (len(kl_windows) - 1)
    return {
        "reference_ppl": math.exp(sum(losses[0]) / len(losses[0])),
        "ppl": math.exp(sum(losses[1]) / len(losses[1])),
        "kl": mean,
        "kl_stderr": math.sqrt(variance / len(kl_windows)),
        "top1": sum(top) / len(top),
    }


def test_scores_are_those_of_the_protocol():
    rows, original, quantized, model = tables(1)
    done = []
    scores = evaluate(model(quantized), model(original), rows, lambda *state: done.append(state))
    for name, value in oracle(rows, original, quantized).items():
        assert getattr(scores, name) == pytest.approx(float(value), rel=1e-5), name
    assert scores.positions == 210
    assert scores.router_topk is None
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert Scores(**scores.as_dict()) == scores


def test_a_model_equals_itself():
    rows, original, _, model = tables(2, count=1)
    scores = evaluate(model(original), model(original + 5), rows)  # logits count up to a constant
    assert scores.kl == pytest.approx(0, abs=1e-6)
    assert scores.top1 == 1
    assert scores.ppl == pytest.approx(scores.reference_ppl, rel=1e-6)
    assert scores.kl_stderr is None


def test_what_cannot_be_compared_is_refused():
    rows, original, quantized, model = tables(3)
    with pytest.raises(ValueError, match="vocabulary of 40 tokens against the original's 50"):
        evaluate(model(quantized[..., :40]), model(original), rows)
    with pytest.raises(ValueError, match=r"expected logits of shape \[70, V\], got \[69, 50\]"):
        evaluate(model(quantized[:, :69]), model(original), rows)
    quantized[1, 3, 4] = math.nan
    with pytest.raises(ValueError, match="quantized model, window 1: logits are not finite"):
        evaluate(model(quantized), model(original), rows)


# --- routing


def test_a_perplexity_beyond_every_number_is_none_and_the_rest_is_kept():
    rows, original, _, model = tables(0)
    reference = model(original)
    scores = evaluate(lambda row: reference(row) * 1e5, reference, rows)
    assert scores.ppl is None
    assert math.isfinite(scores.reference_ppl)
    assert math.isfinite(scores.kl)
    with pytest.raises(ValueError, match="window 0: logits too far apart"):
        evaluate(lambda row: reference(row).clamp(-3, 3) * 1e38, reference, rows)


def test_windows_of_one_token_predict_nothing():
    rows, original, quantized, model = tables(0)
    with pytest.raises(ValueError, match="give two tokens at least"):
        evaluate(model(quantized), model(original), rows[:, :1])


def build(family, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def expert_sets(model, row):
    """Sets of chosen experts, block by block, seen from the inputs that the experts module gets."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, __: seen.append([set(x.tolist()) for x in inputs[1]]))
        for name, module in model.named_modules()
        if name.endswith("experts")
    ]
    with torch.no_grad():
        model(row[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("family", "blocks"), [("dbrx", 2), ("mixtral", 2), ("qwen3 moe", 1), ("llama", 0)])
def test_routing_agreement_is_the_share_of_equal_expert_sets(family, blocks):
    original, quantized = build(family, 1), build(family, 1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    rows = torch.randint(0, 128, (2, 40), generator=generator)
    scores = evaluate(quantized, original, rows)
    if not blocks:
        assert scores.router_topk is None
        return
    equal = [0] * blocks
    for row in rows:
        pairs = zip(expert_sets(original, row), expert_sets(quantized, row), strict=True)
        for block, (a, b) in enumerate(pairs):
            equal[block] += sum(x == y for x, y in zip(a, b, strict=True))
    assert scores.router_topk == tuple(n / 80 for n in equal)
    assert 0 < min(scores.router_topk) < 1
    assert evaluate(original, original, rows).router_topk == (1.0,) * blocks
    assert not any(module._forward_hooks for module in original.modules())


def test_models_with_different_experts_are_not_compared():
    rows = torch.randint(0, 128, (1, 10))
    with pytest.raises(ValueError, match="1 blocks with experts against the original's 2"):
        evaluate(build("qwen3 moe", 1), build("mixtral", 1), rows)


# --- the cache of the original


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_a_cached_original_scores_like_one_beside(tmp_path, dtype, tolerance):
    original, quantized = build("mixtral", 1), build("mixtral", 2)
    rows = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    cache = cache_reference(original, rows, tmp_path / "cache", dtype)
    beside, cached = evaluate(quantized, original, rows), evaluate(quantized, cache, rows)
    for name in ("ppl", "reference_ppl", "kl", "kl_stderr"):
        assert getattr(cached, name) == pytest.approx(getattr(beside, name), rel=tolerance)
    assert (cached.top1, cached.router_topk) == (beside.top1, beside.router_topk)


def test_a_cache_continues_where_it_stopped(tmp_path):
    rows, original, quantized, model = tables(5)
    ran = []

    def counted(row):
        ran.append(1)
        return model(original)(row)

    cache_reference(counted, rows[:2], tmp_path)
    cache = cache_reference(counted, rows, tmp_path)
    assert len(ran) == 3
    assert evaluate(model(quantized), cache, rows).router_topk is None
    cache_reference(counted, rows, tmp_path, torch.float16)
    assert len(ran) == 6


def test_a_wrong_or_broken_cache_is_refused(tmp_path):
    rows, original, quantized, model = tables(6)
    cache = cache_reference(model(original), rows[:2], tmp_path)
    with pytest.raises(CheckpointError, match="fewer than 3 windows"):
        evaluate(model(quantized), cache, rows)
    with pytest.raises(CheckpointError, match="made from another text"):
        evaluate(model(quantized), cache, rows.flip(0))
    with pytest.raises(CheckpointError, match="made from another text"):
        cache_reference(model(original), rows.flip(0), tmp_path)
    with pytest.raises(ValueError, match="float32 or float16"):
        cache_reference(model(original), rows, tmp_path, torch.bfloat16)
    path = tmp_path / "window-00000.safetensors"
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    safetensors.torch.save_file({"top": torch.zeros(70)}, path, metadata)
    seal(path)
    with pytest.raises(CheckpointError, match="log_probs is missing"):
        evaluate(model(quantized), cache, rows)
    path.write_bytes(path.read_bytes()[:20])
    seal(path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        evaluate(model(quantized), cache, rows)


def test_a_damaged_window_of_a_cache_is_refused_and_computed_again_from_the_original(tmp_path):
    rows, original, quantized, model = tables(6)
    cache = cache_reference(model(original), rows, tmp_path)
    sound = evaluate(model(quantized), cache, rows)
    path = tmp_path / "window-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"window-00001.safetensors: damaged since it was written; fill"
    ):
        evaluate(model(quantized), cache, rows)
    assert evaluate(model(quantized), cache_reference(model(original), rows, tmp_path), rows) == sound


# --- windows


def test_windows_are_the_first_tokens_without_special_ones(tmp_path):
    folder = write_tokenizer(tmp_path / "m", bos=True)
    text = tmp_path / "t.txt"
    text.write_text("abcdefghij" * 3)
    rows = windows(folder, text, 3, 10)
    assert rows.shape == (3, 10)
    assert rows.dtype == torch.int64
    assert torch.equal(rows[0], rows[2])
    assert 1 not in rows  # no BOS
    with pytest.raises(ValueError, match="30 tokens hold 2 windows of 12, 3 requested"):
        windows(folder, text, 3, 12)
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        windows(folder, text, 3, 1)
    text.write_bytes(b"a\xff")
    with pytest.raises(CheckpointError, match="not UTF-8 at byte 1"):
        windows(folder, text, 1, 2)


@pytest.mark.slow
def test_tiny_dbrx_has_the_published_perplexity(shared):
    folder = shared / "models" / "tiny-dbrx"
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=load_config(folder), dtype=torch.float32
    ).eval()
    scores = evaluate(model, model, windows(folder, shared / "data" / "wikitext2-test.txt", 40, 512))
    assert scores.ppl == pytest.approx(82.43, abs=0.005)
    assert scores.kl == 0
    assert scores.router_topk == (1.0,) * 4
