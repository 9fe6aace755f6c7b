"""Write a quantized folder of DBRX's shapes with random codes, for benches of loading and running.

    python -m dbrx_quant.scripts.full_size.make_quantized OUT [--blocks N] [--experts E] [--bits B]
        [--vocabulary V]

Nothing is solved, and what the model says has no meaning. Without options it has the sizes of dbrx-instruct
at about 2.25 bits per weight, 38 GB, a shard a block; one block is in memory at a time, and the same
arguments give the same bytes. It has no tokenizer, no checksums and no measurement.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dbrx_quant.runtime.exl2.format import padded_columns
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.facts import LinearSpec
from dbrx_quant.runtime.files.atomic import save_tensors, write_json
from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

GROUP_ROWS = 128
SEED_STEP = 1_000_003
HEAD_BITS = 6


def write_folder(out: Path, blocks: int, experts: int, bits: float, vocabulary: int) -> list[Path]:
    """Write the folder and return its shards.

    Args:
        out: the folder, made if needed.
        blocks: of the model.
        experts: of a block, 4 of which are active.
        bits: of a code on average, 2 to 4: groups of the width above come first, the rest has that below.
        vocabulary: rows of embedding and head, a multiple of 32.
    """
    from transformers import DbrxConfig

    config = DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=blocks,
        vocab_size=vocabulary,
        attn_config={"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": experts, "moe_top_k": 4},
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config.architectures = ["DbrxForCausalLM"]
    out.mkdir(parents=True, exist_ok=True)
    raw = json.loads(config.to_json_string()) | {"quantization_config": {"quant_method": "exl2"}}
    raw.pop("rope_parameters")
    write_json(out / "config.json", raw | {"rope_theta": 500000.0})
    architecture = describe(config)
    parts = [(block.floats, tuple(block.linears())) for block in architecture.blocks]
    parts.append((architecture.floats, (architecture.head,)))
    shards = []
    for number, (floats, linears) in enumerate(parts):
        generator = torch.Generator().manual_seed(SEED_STEP * number)
        tensors: dict[str, Tensor] = {}
        for kept in floats:
            values = torch.empty(kept.shape).normal_(std=0.02, generator=generator)
            tensors[kept.name] = (values + 1 if len(kept.shape) == 1 else values).half()
        for spec in linears:
            width = HEAD_BITS if spec.role == "head" else bits
            stored = random_linear(spec, width, generator)
            tensors |= {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        shards.append(out / f"model-{number + 1:05}-of-{len(parts):05}.safetensors")
        save_tensors(shards[-1], tensors)
    return shards


def random_linear(spec: LinearSpec, bits: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The stored tensors of a linear with random codes and scales; outputs are about as large as inputs."""
    k, n = spec.shape[0], padded_columns(spec.shape[1])
    count, low = k // GROUP_ROWS, int(bits)
    wide = round((bits - low) * count)
    table, word = [], 0
    for group in range(count):
        width = low + (group < wide)
        table += [width, word]
        word += width * GROUP_ROWS // 32
    least, most = -(2**31), 2**31 - 1

    def words(*shape: int) -> Tensor:
        return torch.randint(least, most, shape, dtype=torch.int32, generator=generator)

    largest = torch.tensor([k**-0.5 * 2.0 ** (1 - width) for width in table[::2]])
    return {
        "q_weight": words(word, n),
        "q_scale": words(count, n // 8),
        "q_scale_max": (4 * largest).half(),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_invperm": torch.randperm(k, generator=generator).int(),
    }


@quiet_on_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--blocks", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="of a block (default: %(default)s)")
    parser.add_argument(
        "--bits", type=float, default=2.22, help="of a code on average (default: %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=100352, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    shards = write_folder(
        arguments.out, arguments.blocks, arguments.experts, arguments.bits, arguments.vocabulary
    )
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{arguments.out}: {len(shards)} shards, {size / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
