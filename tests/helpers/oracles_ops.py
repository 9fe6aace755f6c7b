"""Oracles of the operators: slow, obvious, written from the format's text; fp64 where the kernels use floats.

Axes: T tokens, K input channels, N output channels, E experts, D hidden, F ffn, A experts per token.
"""

import numpy as np
import torch

SUFFIXES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
ISAS = ("scalar", "avx2", "avxvnni", "avx512")  # instruction sets that there are kernels for
SHAPES = {  # name: groups, N; every backend runs these and some of its own
    "one group": ([(4, 32)], 32),
    "ragged last group": ([(6, 64), (3, 128), (3, 32)], 96),
    "every width": ([(8, 32), (6, 32), (5, 64), (4, 96), (3, 64), (2, 32)], 160),
    "a 2-bit tail of 16 rows": ([(4, 32), (2, 80)], 64),
    "a tail alone": ([(2, 16)], 32),
}


def random_tensors(groups, n, seed=0, bias=False, scale=0.02):
    """The stored tensors of a random linear: `groups` is [(bits, rows), …]; any bits are legal codes."""
    rng = np.random.default_rng(seed)
    k = sum(rows for _, rows in groups)
    table, word = [], 0
    for bits, rows in groups:
        table += [bits, word]
        word += rows * bits // 32
    tensors = {
        "q_weight": torch.from_numpy(rng.integers(0, 2**32, (word, n), np.uint32).view(np.int32)),
        "q_scale": torch.from_numpy(rng.integers(0, 2**32, (len(groups), n // 8), np.uint32).view(np.int32)),
        "q_scale_max": torch.from_numpy((rng.random(len(groups)) * scale).astype(np.float16)),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_invperm": torch.from_numpy(rng.permutation(k).astype(np.int32)),
    }
    if bias:
        tensors["bias"] = torch.from_numpy(rng.standard_normal(n).astype(np.float16))
    return tensors


def unpack(tensors):
    """Codes [K, N] in packed row order, bit after bit of each column's stream, with the bits of each row."""
    words = tensors["q_weight"].numpy().view(np.uint32)
    table = tensors["q_groups"].tolist()
    bits, starts = table[0::2], [*table[1::2], words.shape[0]]
    codes, widths, index = [], [], []
    for g, b in enumerate(bits):
        for r in range((starts[g + 1] - starts[g]) * 32 // b):
            code = np.zeros(words.shape[1], np.int64)
            for bit in range(b):
                at = r * b + bit
                code |= ((words[starts[g] + at // 32] >> np.uint32(at % 32)) & 1).astype(np.int64) << bit
            codes.append(code)
            widths.append(b)
            index.append(g)
    return np.stack(codes), np.array(widths), np.array(index)


def dequantize(tensors):
    """The exact weight [K, N] float16: three roundings to half, in the order that the format names."""
    codes, widths, group = unpack(tensors)
    nibbles = np.stack(
        [(tensors["q_scale"].numpy().view(np.uint32) >> (4 * i)) & 15 for i in range(8)], axis=2
    )
    steps = nibbles.reshape(nibbles.shape[0], -1).astype(np.float64) + 1  # [G, N]
    with np.errstate(over="ignore"):
        unit = (tensors["q_scale_max"].numpy().astype(np.float64) / 256).astype(np.float16)
        scale = (steps**2 * unit.astype(np.float64)[:, None]).astype(np.float16)
        signed = codes - 2 ** (widths - 1)[:, None]
        packed = (signed * scale.astype(np.float64)[group]).astype(np.float16)
    return torch.from_numpy(packed[tensors["q_invperm"].numpy()])


def linear(x, tensors, out_features, dtype=torch.float64):
    """y [T, out_features] in `dtype` arithmetic."""
    y = x.to(dtype) @ dequantize(tensors)[:, :out_features].to(dtype)
    return y + tensors["bias"][:out_features].to(dtype) if "bias" in tensors else y


ACTIVATIONS = {
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
    "gelu_tanh": lambda v: v * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    "relu": lambda v: torch.where(v > 0, v, torch.zeros_like(v)),
}


def experts(x, index, weights, linears, activation, dtype=torch.float64):
    """y [T, D], token by token: linears[e] = (gate, up, down); an index of E adds nothing."""
    hidden = x.shape[1]
    dense = [tuple(dequantize(tensors).to(dtype) for tensors in expert) for expert in linears]
    y = torch.zeros(x.shape, dtype=dtype)
    for t in range(x.shape[0]):
        for a in range(index.shape[1]):
            if index[t, a] == len(linears):
                continue
            gate, up, down = dense[index[t, a]]
            ffn = down.shape[0]
            state = x[t].to(dtype)
            inner = ACTIVATIONS[activation](state @ gate[:, :ffn]) * (state @ up[:, :ffn])
            y[t] += weights[t, a].to(dtype) * (inner @ down[:, :hidden])
    return y


def first_difference(ours, wanted):
    """None where two tensors hold the same bits, else the place and both values."""
    if ours.shape != wanted.shape or ours.dtype != wanted.dtype:
        return f"{ours.dtype} {tuple(ours.shape)} against {wanted.dtype} {tuple(wanted.shape)}"
    integer = {2: torch.int16, 4: torch.int32, 1: torch.int8}[ours.element_size()]
    differ = ours.contiguous().view(integer) != wanted.contiguous().view(integer)
    if not differ.any():
        return None
    at = tuple(differ.nonzero()[0].tolist())
    return f"at {at}: {ours[at].item()} against {wanted[at].item()}"


def rms(error):
    return error.double().square().mean().sqrt().item()
