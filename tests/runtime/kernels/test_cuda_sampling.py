"""The choice of the next token on the emulator: exact for greedy, within chance for all else."""

import ctypes

import decoder_calls
import pytest
import torch
from decoder_calls import Sample

from dbrx_quant.runtime.library import _abi

pytestmark = pytest.mark.usefixtures("emulated")


def sample(library, logits, past=0, **how):
    """The next token of each row of logits [B, V]."""
    sequences, vocabulary = logits.shape
    sampling = _abi.CudaSampling(
        how.get("temperature", 1.0), how.get("top_p", 1.0), how.get("top_k", 0), how.get("seed", 0)
    )
    tokens = torch.full((sequences,), -1)
    positions, made = (torch.full((sequences,), n, dtype=torch.int32) for n in (past, 1))
    generated = torch.full((sequences, 2), -1)
    args = Sample(
        logits=logits.data_ptr(),
        sampling=ctypes.addressof(sampling),
        vocabulary=vocabulary,
        sequences=sequences,
        tokens=tokens.data_ptr(),
        past=positions.data_ptr(),
        generated=generated.data_ptr(),
        made=made.data_ptr(),
        room=2,
    )
    decoder_calls.run(library, args)
    assert positions.tolist() == [past + 1] * sequences
    assert made.tolist() == [2] * sequences
    assert torch.equal(generated[:, 1], tokens)
    assert generated[:, 0].eq(-1).all()
    return tokens


def test_without_temperature_it_is_the_first_of_the_largest_logits(emulated):
    logits = torch.randn(3, 1000)
    logits[1, [17, 400]] = 9.0
    logits[2, 5] = float("nan")
    wanted = logits.nan_to_num(-1e9).argmax(-1)
    assert wanted[1] == 17
    assert torch.equal(sample(emulated, logits, temperature=0.0), wanted)


def allowed(logits, temperature, top_k, top_p):
    """The tokens that transformers' warpers leave."""
    chances = (logits.double() / temperature).softmax(-1)
    order = chances.argsort(descending=True)
    if top_k:
        order = order[:top_k]
    kept = chances[order] / chances[order].sum()
    before = kept.cumsum(0) - kept
    return set(order[before < top_p].tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (40, 0.8), (1, 1.0), (0, 1e-6)])
def test_only_tokens_within_the_limits_are_chosen(top_k, top_p, emulated):
    logits = 3 * torch.randn(1, 300)
    kept = allowed(logits[0], 0.8, top_k, top_p)
    how = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    found = {int(sample(emulated, logits, seed=seed, **how)) for seed in range(25)}
    assert found <= kept
    assert len(found) > 1 or len(kept) == 1


def test_tokens_come_as_often_as_their_chance_says(emulated):
    chances = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])
    logits, draws = chances.log()[None].repeat(8, 1).contiguous(), []
    for past in range(50):
        draws += sample(emulated, logits, past=past, seed=3).tolist()
    shares = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    assert shares[2] == 0
    assert (shares - chances).abs().max() < 0.08  # 400 draws: three deviations


def test_the_same_seed_and_position_choose_the_same_token(emulated):
    logits = torch.randn(8, 50)
    first = sample(emulated, logits, past=7, seed=1)
    emulated.dbrxq_emulator_seed(ctypes.c_uint64(5))  # another schedule
    assert torch.equal(sample(emulated, logits, past=7, seed=1), first)
    assert not torch.equal(sample(emulated, logits, past=8, seed=1), first)
    assert not torch.equal(sample(emulated, logits, past=7, seed=2), first)
