"""Small dense models with random weights, saved like a Hub folder, and ways to run them."""

import torch
from safetensors.torch import load_file, save_file
from small_configs import CONFIGS
from tiny_output import make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from dbrx_quant.calibration.blocks.routing import tokens_of
from dbrx_quant.calibration.text.tokens import TokenRows, save_tokens
from dbrx_quant.runtime.families.config import load_config

VOCABULARY = 300  # of the tokenizer that `make_tokenizer` writes, with some room
EXPERTS = ("dbrx", "mixtral", "qwen2 moe", "qwen3 moe")


def save_model(folder, family, seed=0, std=0.1, change=None, configure=None):
    """A model of one of the families with normal weights.

    `configure` may alter its configuration, `change` the tensors of its file.
    """
    config = CONFIGS[family]()
    config.vocab_size = VOCABULARY
    if configure is not None:
        configure(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=std)
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.data += 1
    model.save_pretrained(folder)
    if change is not None:
        alter(folder, change)
    make_tokenizer(folder)
    return folder


def alter(folder, change):
    """Let `change` alter the tensors of a model of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def whole_model(folder):
    """The model as transformers runs it, in float32."""
    config = load_config(folder)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def random_tokens(rows, length, seed=0, vocabulary=VOCABULARY):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_random_tokens(path, rows, length, seed=0, vocabulary=VOCABULARY):
    save_tokens(path, TokenRows(random_tokens(rows, length, seed, vocabulary), {"source": "random"}))
    return path


def expert_output(x, weights, act):
    """down(act(gate x) * up x) for tokens [T, D] and weights [N, K] of gate, up and down."""
    gate, up, down = weights
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def run_block(model, index, states):
    """A whole block of a streamed model, its experts included."""
    live = model.block(index)
    output, routing = live(states)
    experts = live.spec.experts
    if experts:
        flat = output.reshape(-1, output.shape[-1])
        for expert, linears in enumerate(experts.linears):
            chosen = tokens_of(routing, expert)
            weights = tuple(model.dense(spec) for spec in linears)
            y = expert_output(routing.x[chosen.index], weights, ACT2FN[experts.activation])
            flat[chosen.index] += chosen.weight[:, None] * y
    return output
