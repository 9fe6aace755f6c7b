"""Small models with random EXL2 weights, and their dense twins, made without any of the loader's code.

A twin is the plain model filled with `dequantize_linear`'s weights: the loaded one must equal it.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from small_configs import CONFIGS
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from dbrx_quant.runtime.exl2.format import (
    WIDTHS,
    Group,
    GroupMap,
    UnpackedLinear,
    dequantize_linear,
    pack_linear,
    padded_columns,
    uniform_groups,
)
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import load_linear
from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.files.atomic import save_tensors, write_json

QUANTIZATION = {"quant_method": "exl2", "version": "0.3.2", "bits": 3.0, "head_bits": 6}
__all__ = ["CONFIGS", "QuantizedFolder", "build_quantized_folder", "random_linear", "round_folder"]


def random_groups(k: int, generator: torch.Generator) -> GroupMap:
    """Groups of 32, 64 or 96 rows (a last one of 16 where K asks for it) with widths that never increase."""
    rows, left = [], k
    while left >= 32:
        rows.append(min(left // 32 * 32, 32 * int(torch.randint(1, 4, (), generator=generator))))
        left -= rows[-1]
    choice = torch.randint(0, len(WIDTHS), (len(rows),), generator=generator)
    groups = [Group(WIDTHS[i], n) for i, n in zip(sorted(choice.tolist()), rows, strict=True)]
    return (*groups, Group(2, left)) if left else tuple(groups)


def random_linear(
    k: int, n: int, generator: torch.Generator, *, bias: bool = False, std: float = 0.1
) -> dict[str, Tensor]:
    """The stored tensors of a random linear [N, K] whose weights have about the given deviation.

    The columns that pad N to a multiple of 32 are random too, so a model that uses them is found out.
    """
    groups, stored = random_groups(k, generator), padded_columns(n)
    codes = [torch.randint(0, 2**g.bits, (g.rows, stored), generator=generator).byte() for g in groups]
    unpacked = UnpackedLinear(
        codes=torch.cat(codes),
        scale_codes=torch.randint(8, 16, (len(groups), stored), generator=generator).byte(),
        scale_max=torch.tensor([std * 12**0.5 / 2**g.bits for g in groups]).half(),
        groups=groups,
        permutation=torch.randperm(k, generator=generator),
        bias=torch.randn(stored, generator=generator).half() if bias else None,
    )
    return pack_linear(unpacked)


def rounded_linear(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """The stored tensors of a weight [N, K], rounded to the nearest code in groups of 32 rows."""
    weight = functional.pad(weight.float(), (0, 0, 0, padded_columns(len(weight)) - len(weight))).T
    k = len(weight)
    groups = uniform_groups(k, bits, 32)
    parts = weight.split(32)
    rows = torch.tensor([len(part) for part in parts])
    scales = torch.stack([part.abs().amax(0) for part in parts]) / (2 ** (bits - 1) - 1)  # [G, N]
    most = scales.amax(1).clamp(min=1e-6).half()
    steps = ((scales / most[:, None].float()).sqrt() * 16).ceil().clamp(1, 16)
    scales = (steps**2 * (most[:, None].float() / 256)).repeat_interleave(rows, 0)  # [K, N]
    low = 2 ** (bits - 1)
    codes = ((weight / scales).round() + low).clamp(0, 2 * low - 1).byte()
    return pack_linear(UnpackedLinear(codes, (steps - 1).byte(), most, groups, torch.arange(k)))


def round_folder(source: Path, path: Path, bits: int = 4) -> Path:
    """Write a model's EXL2 checkpoint with all linears rounded: quick, and near enough to say words."""
    opened = open_source(source)
    architecture, checkpoint = opened.architecture, opened.checkpoint
    path.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    write_json(path / "config.json", raw | {"quantization_config": QUANTIZATION, "dtype": "float16"})
    tensors = {kept.name: checkpoint.load(kept.name).half() for kept in architecture.all_floats()}
    for spec in architecture.linears():
        stored = rounded_linear(load_linear(checkpoint, spec), bits)
        tensors |= {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


@dataclass
class QuantizedFolder:
    """An EXL2 model folder and the tensors in it, which `write` writes again after a change."""

    path: Path
    tensors: dict[str, Tensor]

    def write(self, name: str = "model.safetensors") -> "QuantizedFolder":
        """Write the tensors as one shard of that name and remove the others."""
        for file in self.path.glob("*.safetensors"):
            file.unlink()
        save_tensors(self.path / name, self.tensors, {"format": "pt"})
        return self

    def linear(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of one linear, keyed by suffix."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def weight(self, name: str, n: int) -> Tensor:
        """The weight [N, K] of a linear, dense or not, without its padding."""
        if f"{name}.q_weight" in self.tensors:
            return dequantize_linear(self.linear(name))[:n]
        return self.tensors[f"{name}.weight"]

    def twin(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The dense model with the same weights."""
        config = load_config(self.path)
        del config.quantization_config
        if "lm_head.q_weight" in self.tensors:
            config.tie_word_embeddings = False
        config._experts_implementation = "eager"  # the fast ones know no float64
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
        filled = {}
        architecture = describe(config)
        for kept in architecture.all_floats():
            filled[kept.parameter] = self.tensors[kept.name]
        modules: dict[str, list[str]] = {}
        for spec in architecture.linears():
            if spec.expert is None:
                modules.setdefault(spec.module, []).append(spec)
        for module, specs in modules.items():
            if module != "lm_head" or not config.tie_word_embeddings:
                weights = [self.weight(spec.name, spec.shape[1]) for spec in specs]
                filled[f"{module}.weight"] = torch.cat(weights)
            if specs[0].bias:
                filled[f"{module}.bias"] = torch.cat(
                    [self.tensors[f"{s.name}.bias"][: s.shape[1]] for s in specs]
                )
        for block in architecture.blocks:
            if block.experts is None:
                continue
            gate, up, down = (
                torch.stack([self.weight(s.name, s.shape[1]) for s in part])
                for part in zip(*block.experts.linears, strict=True)
            )
            module = block.experts.module
            if architecture.family == "dbrx":
                filled[f"{module}.mlp.w1"] = gate.flatten(0, 1)
                filled[f"{module}.mlp.v1"] = up.flatten(0, 1)
                filled[f"{module}.mlp.w2"] = down.transpose(1, 2).flatten(0, 1)
            else:
                filled[f"{module}.gate_up_proj"] = torch.cat([gate, up], dim=1)
                filled[f"{module}.down_proj"] = down
        parameters = dict(model.named_parameters())
        assert filled.keys() == parameters.keys()
        with torch.no_grad():
            for name, value in filled.items():
                parameters[name].copy_(value)
        return model


def made_once(make):
    """A function of a name that makes what `make` does of it, once for each name."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return of


def build_quantized_folder(
    config, path: Path, seed: int = 0, *, head: bool = True, shard: str = "model.safetensors"
) -> QuantizedFolder:
    """Write an EXL2 checkpoint of a configuration with random weights, under EXL2 names.

    Args:
        config: a transformers configuration; every K in it a multiple of 16.
        path: the folder to make.
        seed: of the weights.
        head: whether lm_head is quantized; else it is stored in 16 bits, or not at all where tied.
        shard: name of the one file.
    """
    generator = torch.Generator().manual_seed(seed)
    config = copy.deepcopy(config)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    path.mkdir(parents=True, exist_ok=True)
    raw = json.loads(config.to_json_string())
    raw |= {"quantization_config": QUANTIZATION, "dtype": "float16"}
    rope = raw.pop("rope_parameters")["rope_theta"]
    raw["rope_theta"] = raw.get("attn_config", {}).get("rope_theta", rope)  # DBRX's class reads only the top
    write_json(path / "config.json", raw)
    architecture = describe(config)
    tensors: dict[str, Tensor] = {}
    for kept in architecture.all_floats():
        values = torch.randn(kept.shape, generator=generator)
        tensors[kept.name] = (1 + 0.1 * values if len(kept.shape) == 1 else 0.5 * values).half()
    for spec in architecture.linears():
        if spec is architecture.head and not head:
            if not architecture.tied:
                values = 0.1 * torch.randn(spec.shape[1], spec.shape[0], generator=generator)
                tensors["lm_head.weight"] = values.half()
            continue
        stored = random_linear(*spec.shape, generator, bias=spec.bias)
        tensors |= {f"{spec.name}.{suffix}": tensor for suffix, tensor in stored.items()}
    return QuantizedFolder(path, tensors).write(shard)
