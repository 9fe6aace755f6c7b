"""Facts of made-up quantized folders, for reports without a conversion."""

import math
import random

from measurements import linear
from measurements import measurement as made

from dbrx_quant.calibration.blocks.routing import ExpertCoverage
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.budget.strategy import Outcome
from dbrx_quant.quantize.output.record import Record
from dbrx_quant.runtime.folder.inspect import FolderFacts, LinearFacts
from dbrx_quant.scripts.report.data import Folder

ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
EXPERT = {"w1": "gate", "v1": "up", "w2": "down"}
DENSE = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
HEAD_BITS = 6


def _entry(choose, role, tokens):
    shape = [256, 128]
    weights, scale = math.prod(shape), choose.lognormvariate(0, 1)
    steps = [2.2 + 0.15 * i for i in range(40)]
    options = [
        (round(b * weights), scale * 4 ** (2 - b) / 1e3, f"3:32x{i % 7 + 1} 2:32")
        for i, b in enumerate(steps)
    ]
    return linear(shape, options, role, scale / 10, tokens)


def measurement(blocks=6, experts=16, seed=0):
    """Curves of a mixture of experts, or of a dense model with `experts=0`."""
    choose, linears, coverage = random.Random(seed), {}, {}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for name, role in ATTENTION.items():
            linears[f"{prefix}.self_attn.{name}"] = _entry(choose, role, 4096)
        if not experts:
            for name, role in DENSE.items():
                linears[f"{prefix}.mlp.{name}"] = _entry(choose, role, 4096)
            continue
        tokens = [choose.randrange(20, 3000) for _ in range(experts)]
        coverage[block] = tuple(ExpertCoverage(count, 0.1, 0.2) for count in tokens)
        for expert, count in enumerate(tokens):
            for name, role in EXPERT.items():
                key = f"{prefix}.block_sparse_moe.experts.{expert}.{name}"
                linears[key] = _entry(choose, role, count)
    linears["lm_head"] = _entry(choose, "head", 4096)
    calibration = {"source": "default", "rows": 16, "length": 256, "seed": 0}
    return made(linears, tokens=4096, coverage=coverage, calibration=calibration)


def evaluation(kl, bpw, text="wiki.txt"):
    """An entry of evaluation.json."""
    return {
        "text": text,
        "windows": 40,
        "length": 512,
        "tokens": 20480,
        "ppl": 8.5,
        "ppl_original": 8.1,
        "kl": kl,
        "kl_stderr": kl / 20,
        "top1": 0.93,
        "router_topk": 0.9,
        "bpw": bpw,
    }


def folder(measured, bpw=3.0, name="made/3.0bpw", model="maker/dbrx-mini"):
    """What `read_folder` would find of a conversion to `bpw`."""
    strategy = allocate(measured, bpw, HEAD_BITS)
    linears = []
    for key, option in strategy.choices.items():
        parts = key.split(".")
        block = int(parts[2]) if parts[0] == "model" else None
        expert = int(parts[5]) if "experts" in parts else None
        entry = measured.linears[key]
        linears.append(
            LinearFacts(key, entry.role, block, expert, entry.shape, option.bits, option.group_map)
        )
    errors = {key: 1e-4 * (i % 50 + 1) for i, key in enumerate(strategy.choices)}
    return Folder(
        name=name,
        facts=FolderFacts("dbrx", tuple(linears), sum(linear.bits for linear in linears) // 8),
        quantization={"version": "dbrx-quant 0.1.0", "head_bits": HEAD_BITS},
        strategy=strategy,
        outcome=Outcome(None, None, ["a note"]),
        measurement=measured,
        record=Record(
            command=f"dbrx-quant convert {model} OUT --bpw {bpw}",
            settings={"model": model, "bpw": bpw, "seed": 0, "calibration": "default"},
            versions={"dbrx-quant": "0.1.0", "torch": "2.13.0"},
            relative_errors=errors,
        ),
        evaluations=[evaluation(1.3 * strategy.kl, strategy.bpw)],
    )
