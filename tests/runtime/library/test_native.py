"""The C library through its thin wrapper: packing, exact weights on every instruction set, threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import ops
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.library import _native

WIDTHS = (8, 6, 5, 4, 3, 2)
pytestmark = pytest.mark.usefixtures("seeded")


@st.composite
def group_maps(draw):
    """Legal maps: widths that never increase, groups of any multiple of 32 rows, perhaps a tail of 16."""
    widths = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6)), reverse=True)
    groups = [(bits, 32 * draw(st.integers(1, 4))) for bits in widths]
    if groups[-1][0] == 2 and draw(st.booleans()):
        groups[-1] = (2, groups[-1][1] + draw(st.sampled_from((-16, 16))))
    return groups


def test_packing_inverts_unpacking_at_every_width():
    groups = [(bits, 64) for bits in WIDTHS] + [(2, 48)]
    tensors = oracle.random_tensors(groups, 96)
    codes = _native.unpack_codes(tensors["q_weight"], tensors["q_groups"], 6 * 64 + 48)
    assert oracle.first_difference(codes, torch.from_numpy(oracle.unpack(tensors)[0]).to(torch.uint8)) is None
    words = _native.pack_codes(codes, tensors["q_groups"], tensors["q_weight"].shape[0])
    assert oracle.first_difference(words, tensors["q_weight"]) is None


@settings(max_examples=40, deadline=None)
@given(group_maps(), st.sampled_from((32, 64, 160)), st.integers(0, 2**16))
def test_any_legal_group_map_unpacks_and_dequantizes_exactly(groups, n, seed):
    tensors = oracle.random_tensors(groups, n, seed)
    k = sum(rows for _, rows in groups)
    codes = _native.unpack_codes(tensors["q_weight"], tensors["q_groups"], k)
    assert torch.equal(codes.long(), torch.from_numpy(oracle.unpack(tensors)[0]))
    assert torch.equal(
        _native.pack_codes(codes, tensors["q_groups"], len(tensors["q_weight"])), tensors["q_weight"]
    )
    wanted = oracle.dequantize(tensors)
    for name in oracle.ISAS:
        try:
            with _native.forced_isa(name):
                weight = ops.dequantize(tensors).t()
        except RuntimeError:
            continue  # this machine lacks it; the fixture `isa` reports that
        assert oracle.first_difference(weight, wanted) is None, name


def test_dequantization_equals_the_golden_files_bit_for_bit(golden_file, isa):
    stored = load_file(golden_file)
    weight = ops.dequantize({suffix: stored[suffix] for suffix in oracle.SUFFIXES})
    assert oracle.first_difference(weight.t(), stored["dequant"]) is None


@pytest.mark.parametrize("part", range(8))
def test_every_scale_maximum_dequantizes_exactly(isa, part):
    halves = np.arange(part, 0x7C00, 8, dtype=np.uint16)  # all finite halves of plus sign, in eight parts
    tensors = oracle.random_tensors([(4, 32)] * len(halves), 32, seed=part)
    tensors["q_scale_max"] = torch.from_numpy(halves.view(np.float16).copy())
    codes = _native.unpack_codes(tensors["q_weight"], tensors["q_groups"], 32 * len(halves)).numpy()
    nibbles = np.stack(
        [(tensors["q_scale"].numpy().view(np.uint32) >> (4 * i)) & 15 for i in range(8)], axis=2
    )
    steps = nibbles.reshape(len(halves), -1).astype(np.float64) + 1
    with np.errstate(over="ignore"):
        unit = (halves.view(np.float16).astype(np.float64) / 256).astype(np.float16)
        scale = (steps**2 * unit.astype(np.float64)[:, None]).astype(np.float16).astype(np.float64)
        wanted = ((codes.astype(np.float64) - 8) * scale.repeat(32, axis=0)).astype(np.float16)
    weight = ops.dequantize_op(*Stored.of(tensors), 32)[torch.argsort(tensors["q_invperm"].long())]
    assert oracle.first_difference(weight, torch.from_numpy(wanted)) is None


def test_splitting_rounds_every_half_scale_times_every_code_to_half():
    # The maths of kernels_impl.h: with c = p (2^13 + 1), c - (c - p) is half(p) wherever that is finite.
    scale = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    split = scale * np.float32(8193)
    assert np.array_equal(split.astype(np.float64), scale.astype(np.float64) * 8193)
    for code in range(-128, 128):
        product = np.float32(code) * scale
        big = np.float32(code) * split
        with np.errstate(over="ignore"):
            wanted = product.astype(np.float16).astype(np.float32)
        finite = np.isfinite(wanted)
        assert np.array_equal((big - (big - product))[finite], wanted[finite]), code


def test_tensors_at_odd_addresses_are_read_in_place(isa):
    tensors = oracle.random_tensors([(5, 32), (3, 64)], 64)
    shifted = {}
    for suffix, tensor in tensors.items():
        data = np.zeros(tensor.nbytes + 64, np.uint8)
        start = (2 - data.ctypes.data) % 4  # two bytes past a multiple of four, as in a safetensors file
        data[start : start + tensor.nbytes] = tensor.numpy().view(np.uint8).reshape(-1)
        view = data[start : start + tensor.nbytes].view(tensor.numpy().dtype).reshape(tensor.shape)
        shifted[suffix] = torch.from_numpy(view)
        assert shifted[suffix].data_ptr() % 4 == 2
    assert oracle.first_difference(ops.dequantize(shifted).t(), oracle.dequantize(tensors)) is None
    x = torch.randn(3, 96)
    assert torch.equal(ops.linear(x, shifted), ops.linear(x, tensors))


def test_the_number_of_threads_changes_no_bit(isa):
    tensors = oracle.random_tensors([(6, 32), (4, 64), (2, 48)], 1248, bias=True)
    x = torch.randn(37, 144)
    results = []
    for threads in (1, 2, 3, 7):
        _native.set_threads(threads)
        results.append([ops.linear(x[:tokens], tensors) for tokens in (1, 5, 37)])
    _native.set_threads(0)
    for other in results[1:]:
        for ours, wanted in zip(other, results[0], strict=True):
            assert torch.equal(ours, wanted)


def test_avx2_and_avx512_give_the_same_bits():
    tensors = oracle.random_tensors([(8, 32), (5, 64), (3, 256), (2, 48)], 160)
    results = []
    for name in ("avx2", "avx512"):
        try:
            with _native.forced_isa(name):
                results.append([ops.linear(torch.ones(t, 400) / 3, tensors) for t in (1, 2, 4, 7, 30)])
        except RuntimeError as error:
            pytest.skip(str(error))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_thread_count_follows_torch_unless_it_is_set():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _native.library().dbrxq_threads() == 2
        _native.set_threads(3)
        torch.set_num_threads(1)
        assert _native.library().dbrxq_threads() == 3
        _native.set_threads(0)
        assert _native.library().dbrxq_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="expected 1 or more"):
        _native.set_threads(-1)


def test_the_environment_chooses_the_instruction_set():
    code = (
        "from dbrx_quant.runtime.library import _abi, _native\n"
        "import torch\n"
        "print(_native.isa())\n"
        "status = _native.library().dbrxq_dequantize(_abi.Linear(), None)\n"
        "try: _native.check(status, 'call')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    for wanted, expected in (("scalar", ["scalar", "ValueError"]), ("sse9", ["unusable", "RuntimeError"])):
        environment = {**os.environ, "DBRXQ_ISA": wanted}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="sse9"), _native.forced_isa("sse9"):
        pass


@pytest.fixture
def unloaded(monkeypatch):
    for name in ("loaded", "_failure"):
        monkeypatch.setattr(_native.LIBRARY, name, None)
    monkeypatch.setattr(_native, "_threads_sent", None)


def test_a_library_with_another_interface_version_is_refused(unloaded, monkeypatch):
    monkeypatch.setattr(_native.LIBRARY, "version", 99)
    assert not _native.available()
    assert "this package needs 99" in _native.why_unavailable()


def test_a_file_that_is_no_library_is_refused(unloaded, monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native.LIBRARY, "find", lambda: tmp_path / "broken.so")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        _native.library()


BROKEN = {
    "a width that the format lacks": ("q_groups", lambda t: t.copy_(torch.tensor([7, 0, 3, 4]))),
    "widths that increase": ("q_groups", lambda t: t.copy_(torch.tensor([2, 0, 3, 4]))),
    "a first group that starts late": ("q_groups", lambda t: t.copy_(torch.tensor([4, 1, 3, 4]))),
    "a group past the end": ("q_groups", lambda t: t.copy_(torch.tensor([4, 0, 3, 700]))),
    "a negative offset": ("q_groups", lambda t: t.copy_(torch.tensor([4, 0, 3, -4]))),
    "a group of 24 rows": ("q_groups", lambda t: t.copy_(torch.tensor([4, 0, 3, 3]))),
    "a row named twice": ("q_invperm", lambda t: t[0].copy_(t[1])),
    "a row past the end": ("q_invperm", lambda t: t[0].fill_(64)),
    "a negative row": ("q_invperm", lambda t: t[0].fill_(-1)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_table_is_an_error_and_never_a_wild_read(fault):
    tensors = oracle.random_tensors([(4, 32), (3, 32)], 32)
    suffix, damage = BROKEN[fault]
    damage(tensors[suffix])
    with pytest.raises(ValueError, match=suffix):
        ops.dequantize(tensors)
    with pytest.raises(ValueError, match=suffix):
        ops.linear(torch.zeros(1, 64), tensors)
