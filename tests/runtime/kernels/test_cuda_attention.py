"""The attention of a decode step on the emulator against torch in fp64: all types of caches, splits."""

import ctypes

import decoder_calls
import pytest
import torch
from decoder_calls import Attention
from emulated import SANITIZED

from dbrx_quant.runtime.library import _abi
from dbrx_quant.runtime.step.byte_cache import to_bytes

pytestmark = pytest.mark.usefixtures("emulated")

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5


class Case:
    """Random inputs of a step, and where its results go."""

    def __init__(
        self, *, past, tokens=1, heads=4, key_heads=2, head_dim=16, dtype=HALF, bits=16, norms=False
    ):
        sequences, rows = len(past), len(past) * tokens
        self.past, self.tokens, self.heads, self.key_heads = past, tokens, heads, key_heads
        self.head_dim, self.dtype, self.bits = head_dim, dtype, bits
        self.capacity = max(past) + tokens + 3
        self.queries = torch.randn(rows, heads, head_dim)
        self.keys, self.values = (torch.randn(rows, key_heads, head_dim) for _ in range(2))
        self.norms = [torch.rand(head_dim).to(dtype) + 0.5 for _ in range(2)] if norms else [None, None]
        angles = torch.rand(self.capacity, head_dim // 2) * 7
        self.cosines, self.sines = (
            torch.cat([f(angles)] * 2, -1).contiguous() for f in (torch.cos, torch.sin)
        )
        old = [torch.randn(sequences, key_heads, self.capacity, head_dim) for _ in range(2)]
        if bits == 8:
            pairs = [to_bytes(each) for each in old]
            self.cache, self.scales = [code for code, _ in pairs], [scale for _, scale in pairs]
        else:
            self.cache, self.scales = [each.to(dtype) for each in old], [None, None]

    def numbers(self, which):
        """Keys (0) or values (1) of the cache, fp64."""
        codes = self.cache[which].double()
        return codes if self.scales[which] is None else codes * self.scales[which].double()

    def turned(self, x, norm, position, clip):
        x = x.double().clamp(-clip, clip)
        if norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()
        half = self.head_dim // 2
        swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cosines[position].double() + swapped * self.sines[position].double()

    def run(self, library, splits=1, clip=float("inf"), scale=0.3):
        rows = self.queries.shape[0]
        cache = _abi.CudaCache(
            *(t.data_ptr() for t in self.cache),
            *(None if t is None else t.data_ptr() for t in self.scales),
            capacity=self.capacity,
        )
        attended = torch.full((rows, self.heads, self.head_dim), float("nan"))
        past = torch.tensor(self.past, dtype=torch.int32)
        partial = torch.full((rows * self.heads * splits * (self.head_dim + 2),), float("nan"))
        tickets = torch.zeros(len(self.past) * self.key_heads, dtype=torch.int32)
        args = Attention(
            queries=self.queries.data_ptr(),
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            query_norm=None if self.norms[0] is None else self.norms[0].data_ptr(),
            key_norm=None if self.norms[1] is None else self.norms[1].data_ptr(),
            cosines=self.cosines.data_ptr(),
            sines=self.sines.data_ptr(),
            cache=ctypes.addressof(cache),
            past=past.data_ptr(),
            sequences=len(self.past),
            tokens=self.tokens,
            heads=self.heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            dtype=_abi.DTYPES[self.dtype],
            cache_bits=self.bits,
            splits=splits,
            scale=scale,
            clip=clip,
            eps=EPS,
            attended=attended.data_ptr(),
            partial=partial.data_ptr(),
            tickets=tickets.data_ptr(),
        )
        decoder_calls.run(library, args)
        assert not tickets.any()
        return attended

    def expected(self, clip=float("inf"), scale=0.3):
        """What `run` gives, from the cache as it is after it."""
        keys, values = self.numbers(0), self.numbers(1)
        out = torch.empty(self.queries.shape, dtype=torch.float64)
        for row in range(self.queries.shape[0]):
            sequence, position = row // self.tokens, self.past[row // self.tokens] + row % self.tokens
            query = self.turned(self.queries[row], self.norms[0], position, clip) * scale
            for head in range(self.heads):
                own = sequence, head // (self.heads // self.key_heads), slice(0, position + 1)
                weights = (keys[own] @ query[head]).softmax(0)
                out[row, head] = weights @ values[own]
        return out

    def expected_rows(self, which, clip=float("inf")):
        """The new keys or values [rows, J, head_dim] before they are rounded."""
        new = (self.keys, self.values)[which]
        if which == 1:
            return new.double().clamp(-clip, clip)
        positions = [past + t for past in self.past for t in range(self.tokens)]
        return torch.stack(
            [self.turned(each, self.norms[1], p, clip) for each, p in zip(new, positions, strict=True)]
        )

    def new_rows(self, which):
        numbers = self.numbers(which)
        return torch.stack(
            [numbers[s, :, past + t] for s, past in enumerate(self.past) for t in range(self.tokens)]
        )


CASES = {
    "one token": {"past": [70]},
    "an empty cache": {"past": [0], "tokens": 3},
    "head norms, several tokens": {"past": [37], "tokens": 4, "norms": True},
    "sequences of different lengths": {"past": [5, 66, 130], "tokens": 2, "dtype": BF16},
    "more query rows than registers hold": {"past": [9], "tokens": 5, "heads": 6, "key_heads": 2},
    "several stretches": {"past": [600], "dtype": FP32, "heads": 2, "key_heads": 1},
    "wide heads": {"past": [20], "heads": 2, "key_heads": 1, "head_dim": 144},
    "bytes": {"past": [100], "tokens": 2, "bits": 8, "norms": True, "head_dim": 48},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_attention_over_a_cache_is_that_of_torch(case, splits, emulated):
    own = Case(**CASES[case])
    before = [each.clone() for each in own.cache]
    found = own.run(emulated, splits)
    error = (found.double() - own.expected()).abs().max()
    assert error < 2e-6, error.item()
    for which in (0, 1):
        rounding = {HALF: 2**-11, BF16: 2**-8, FP32: 2**-22}[own.dtype] if own.bits == 16 else 0.5 / 127
        rows = own.expected_rows(which)
        limit = rounding * rows.abs().amax(-1, keepdim=True) * 1.01
        assert ((own.new_rows(which) - rows).abs() <= limit).all()
        for sequence, past in enumerate(own.past):  # nothing else of the cache has changed
            assert torch.equal(own.cache[which][sequence, :, :past], before[which][sequence, :, :past])
            end = past + own.tokens
            assert torch.equal(own.cache[which][sequence, :, end:], before[which][sequence, :, end:])


def test_queries_keys_and_values_are_cut_before_anything_else(emulated):
    own = Case(past=[6], tokens=2, norms=True)
    found = own.run(emulated, clip=0.7)
    assert (found.double() - own.expected(clip=0.7)).abs().max() < 2e-6
    assert (own.new_rows(1) - own.expected_rows(1, clip=0.7)).abs().max() < 1e-3


def test_splits_give_the_same_bits_under_every_schedule(emulated):
    own = Case(past=[200], tokens=2)
    found = []
    for seed in range(2 if SANITIZED else 6):
        emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
        found.append(own.run(emulated, 4))
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_step_beyond_the_cache_touches_nothing(emulated):
    own = Case(past=[4])
    own.past, before = [own.capacity], [each.clone() for each in own.cache]
    assert own.run(emulated).isnan().all()
    assert all(torch.equal(one, other) for one, other in zip(own.cache, before, strict=True))
