"""vLLM with the plugin says what our own runtime says: every family, one process and two, compiled or not."""

import pytest
import torch
from places import TINY
from quant_models import build_quantized_folder
from small_configs import SMALL
from tiny_output import make_tokenizer
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from vllm_tokens import vllm_tokens

from dbrx_quant import ConvertOptions, convert, load_model
from dbrx_quant.runtime.folder.repacked_file import write_repacked
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.vllm.opening import open_folder

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test_vllm.sh makes an environment with it")

COUNT = 24
MARGIN = 1e-3  # between logits of the same weights, summed up in another order

# vLLM's attention on the CPU wants heads of 32 channels at least.
WIDE = SMALL | {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "tied and biased": LlamaConfig(**WIDE, tie_word_embeddings=True, attention_bias=True),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2 moe": Qwen2MoeConfig(**WIDE, **MOE, shared_expert_intermediate_size=96),
    "qwen3 moe": Qwen3MoeConfig(**WIDE, **MOE, mlp_only_layers=[1]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → folder, made when it is asked for; "dbrx" is a trained model, converted."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name.replace(" ", "-")) / "model"
            if name == "dbrx":
                convert(
                    ConvertOptions(
                        TINY, path, targets=(3.0,), calibration="offline", rows=8, length=128, quiet=True
                    )
                )
            else:
                build_quantized_folder(CONFIGS[name], path)
                make_tokenizer(path)
            made[name] = path
        return made[name]

    return folder


def prompts(count=20):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [torch.randint(1, 250, (n,), generator=generator).tolist() for n in lengths]


def worst_choice(folder, given, answers):
    """By how much the tokens of the answers fall short of the best logits of our runtime, at most."""
    model, worst = load_model(folder), 0.0
    for prompt, answer in zip(given, answers, strict=True):
        assert len(answer) == COUNT
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, float((logits.max(dim=1).values - chosen).max()))
    return worst


@pytest.mark.parametrize("name", ["dbrx", *CONFIGS])
def test_every_token_of_twenty_prompts_is_our_runtimes_best(folders, tmp_path, name):
    folder, given = folders(name), prompts()
    answers = vllm_tokens(folder, tmp_path, given, COUNT)
    assert worst_choice(folder, given, answers) < MARGIN


@pytest.mark.parametrize("name", ["dbrx", "tied and biased", "qwen2 moe"])
def test_two_processes_say_what_one_says(folders, tmp_path, name):
    folder, given = folders(name), prompts()
    answers = vllm_tokens(folder, tmp_path, given, COUNT, tensor_parallel_size=2)
    assert worst_choice(folder, given, answers) < MARGIN


def test_expert_parallel_processes_say_what_one_says(folders, tmp_path):
    folder, given = folders("mixtral"), prompts()
    answers = vllm_tokens(folder, tmp_path, given, COUNT, tensor_parallel_size=2, enable_expert_parallel=True)
    assert worst_choice(folder, given, answers) < MARGIN


def test_a_compiled_model_says_the_same(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder, given = folders("dbrx"), prompts()
    answers = vllm_tokens(folder, tmp_path, given, COUNT, enforce_eager=False)
    assert worst_choice(folder, given, answers) < MARGIN


def test_bodies_that_are_mapped_from_a_repacked_file_give_the_same(folders, tmp_path):
    folder, given = folders("mixtral"), prompts(4)
    write_repacked(open_folder(folder).contents)
    try:
        answers = vllm_tokens(folder, tmp_path, given, COUNT, activations="int8")
    finally:
        (folder / "repacked.bin").unlink()
    with use_activations("int8"):  # what is rounded to integers changes by a step where sums differ at all
        assert worst_choice(folder, given, answers) < 100 * MARGIN
