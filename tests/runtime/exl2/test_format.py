"""The format both ways: vectors written by exllamav2's own code, published words, random group maps."""

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dbrx_quant.runtime.exl2.format import (
    SUFFIXES,
    WIDTHS,
    Group,
    UnpackedLinear,
    check_groups,
    dequantize_linear,
    pack_codes,
    pack_linear,
    storage_bits,
    uniform_groups,
    unpack_codes,
    unpack_linear,
    validate_linear,
)
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.kernels.stored import Stored


def linear_tensors(path):
    tensors = load_file(path)
    return {s: tensors[s] for s in (*SUFFIXES, "bias") if s in tensors}, tensors


def random_linear(groups, n, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    k = sum(g.rows for g in groups)
    limit = torch.cat([torch.full((g.rows, 1), 2**g.bits) for g in groups])
    codes = (torch.rand(k, n, generator=generator) * limit).to(torch.uint8)
    return UnpackedLinear(
        codes=codes,
        scale_codes=torch.randint(0, 16, (len(groups), n), generator=generator, dtype=torch.uint8),
        scale_max=(torch.rand(len(groups), generator=generator) * 0.05).half(),
        groups=tuple(groups),
        permutation=torch.randperm(k, generator=generator),
        bias=torch.randn(n, generator=generator).half() if bias else None,
    )


def test_dequantization_equals_the_reference_bit_for_bit(golden_file):
    tensors, everything = linear_tensors(golden_file)
    ours, theirs = dequantize_linear(tensors).T, everything["dequant"]
    differ = ours.contiguous().view(torch.int16) != theirs.view(torch.int16)
    assert not differ.any(), f"first difference at {differ.nonzero()[0].tolist()}"


def test_repacking_what_was_unpacked_gives_the_same_bytes(golden_file):
    tensors, _ = linear_tensors(golden_file)
    validate_linear(tensors, golden_file.stem)
    again = pack_linear(unpack_linear(tensors))
    assert again.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert again[suffix].dtype == tensor.dtype
        assert torch.equal(again[suffix], tensor), suffix


FIRST_WORDS = {  # the words of the codes (7 i + 3) mod 2^bits, i = 0 … 31
    2: "1b1b1b1b 1b1b1b1b",
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    5: "4dfc4543 78245ba3 0753617d 4b276cf4 e55c7066",
    6: "9f611283 90bbd2d9 b2579740 8f201eb3 9cab91d5 71538703",
    8: "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
}


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_words_are_the_published_ones(bits):
    codes = ((7 * torch.arange(32) + 3) % 2**bits).to(torch.uint8)[:, None].expand(32, 32).contiguous()
    words = pack_codes(codes, (Group(bits, 32),))[:, 5].tolist()
    assert " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words) == FIRST_WORDS[bits]


def test_a_mixed_tensor_decodes_to_the_published_checksum():
    groups = (Group(6, 32), Group(4, 32), Group(3, 64))
    row, column = torch.arange(128)[:, None], torch.arange(32)[None]
    group = torch.tensor([0] * 32 + [1] * 32 + [2] * 64)[:, None]
    width = torch.tensor([64] * 32 + [16] * 32 + [8] * 64)[:, None]
    unpacked = UnpackedLinear(
        codes=((5 * row + 3 * column + group) % width).to(torch.uint8),
        scale_codes=((7 * torch.arange(3)[:, None] + column) % 16).to(torch.uint8),
        scale_max=torch.tensor([0x22CF, 0x3A00, 0x1A25], dtype=torch.int16).view(torch.float16),
        groups=groups,
        permutation=(37 * torch.arange(128) + 11) % 128,
    )
    tensors = pack_linear(unpacked)
    assert zlib.crc32(tensors["q_weight"].numpy().tobytes()) == 0xE9AC0633
    assert tensors["q_groups"].tolist() == [6, 0, 4, 6, 3, 10]
    assert tensors["q_invperm"][:4].tolist() == [17, 62, 107, 24]
    assert zlib.crc32(dequantize_linear(tensors).T.contiguous().numpy().tobytes()) == 0x3A8A1B66


group_maps = st.lists(
    st.tuples(st.sampled_from(WIDTHS), st.sampled_from([32, 64, 96, 128, 160])), min_size=1, max_size=7
).map(lambda pairs: tuple(Group(b, r) for b, r in sorted(pairs, key=lambda pair: -pair[0])))


@settings(max_examples=60, deadline=None)
@given(groups=group_maps, n=st.sampled_from([32, 64, 96]), seed=st.integers(0, 999), bias=st.booleans())
def test_unpack_inverts_pack_for_any_legal_group_map(groups, n, seed, bias):
    unpacked = random_linear(groups, n, seed, bias)
    tensors = pack_linear(unpacked)
    assert validate_linear(tensors, "m") == groups
    again = unpack_linear(tensors)
    assert again.groups == unpacked.groups
    for field in ("codes", "scale_codes", "scale_max", "permutation"):
        assert torch.equal(getattr(again, field), getattr(unpacked, field)), field


@settings(max_examples=60, deadline=None)
@given(groups=group_maps, n=st.sampled_from([32, 96]), bias=st.booleans())
def test_storage_bits_are_the_bytes_that_pack_writes(groups, n, bias):
    tensors = pack_linear(random_linear(groups, n, bias=bias))
    k = sum(g.rows for g in groups)
    assert storage_bits(groups, (k, n), bias) == 8 * sum(t.nbytes for t in tensors.values())


def test_a_two_bit_tail_of_sixteen_rows_is_legal_and_no_other_tail_is():
    check_groups((Group(3, 32), Group(2, 16)), 48)
    codes = torch.randint(0, 4, (48, 32), dtype=torch.uint8)
    groups = (Group(2, 32), Group(2, 16))
    assert torch.equal(unpack_codes(pack_codes(codes, groups), groups), codes)
    with pytest.raises(ValueError, match="16 rows"):
        check_groups((Group(3, 16),), 16)


def test_uniform_groups_cut_the_last_one_short():
    assert [g.rows for g in uniform_groups(160, 4, 64)] == [64, 64, 32]


def broken(change):
    tensors = pack_linear(random_linear((Group(4, 64), Group(3, 64)), 64))
    change(tensors)
    return tensors


def put(suffix, index, value):
    def change(tensors):
        tensors[suffix][index] = value

    return change


def replace(suffix, function):
    def change(tensors):
        tensors[suffix] = function(tensors[suffix])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("q_invperm"), r"q_invperm: missing"),
        (replace("q_weight", lambda t: t.long()), r"q_weight: dtype torch.int64, expected torch.int32"),
        (replace("q_groups", lambda t: t.int()), r"q_groups: dtype torch.int32"),
        (replace("q_scale_max", lambda t: t.float()), r"q_scale_max: dtype torch.float32"),
        (replace("q_weight", lambda t: t[:, :40].contiguous()), r"q_weight: 40 columns"),
        (replace("q_weight", lambda t: t[:-1].contiguous()), r"q_groups: group 1"),
        (replace("q_weight", lambda t: t[None]), r"q_weight: shape .* expected 2 dimensions"),
        (replace("q_scale", lambda t: t[:, :-1].contiguous()), r"q_scale: shape \(2, 7\), expected \(2, 8\)"),
        (replace("q_groups", lambda t: t[:-1].contiguous()), r"q_groups: 3 entries, expected 4"),
        (put("q_groups", 0, 7), r"q_groups: group 0: 7 bits"),
        (put("q_groups", 1, 1), r"q_groups: the first group starts at word row 1"),
        (put("q_groups", 3, 0), r"q_groups: group 0: starts at word row 0 and ends at 0"),
        (put("q_groups", 3, 6), r"q_groups: group 1: 8 words do not hold whole rows"),
        (put("q_groups", 0, 2), r"q_groups: group 1: 3 bits follow 2"),
        (put("q_scale_max", 1, float("inf")), r"q_scale_max: group 1 is inf"),
        (put("q_scale_max", 1, -1.0), r"q_scale_max: group 1 is -1"),
        (put("q_invperm", 3, 128), r"q_invperm: entry 3 is 128, expected 0 to 127"),
        (put("q_invperm", 3, -1), r"q_invperm: entry 3 is -1"),
        (
            lambda t: t["q_invperm"].__setitem__(0, int(t["q_invperm"][1])),
            r"q_invperm: row \d+ occurs 2",
        ),
        (lambda t: t.update(q_extra=torch.zeros(1)), r"q_extra: is not a tensor of the format"),
        (lambda t: t.update(bias=torch.zeros(65).half()), r"bias: 65 entries, expected 64"),
    ],
)
def test_the_validator_names_file_tensor_and_reason(change, message):
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: model\.x\." + message):
        validate_linear(broken(change), "model.x", "shard.safetensors")


def test_packing_refuses_what_the_format_cannot_hold():
    good = random_linear((Group(4, 64),), 32)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_linear(
            UnpackedLinear(
                good.codes[:, :31], good.scale_codes, good.scale_max, good.groups, good.permutation
            )
        )
    with pytest.raises(ValueError, match="every input channel once"):
        pack_linear(
            UnpackedLinear(
                good.codes, good.scale_codes, good.scale_max, good.groups, torch.zeros(64, dtype=torch.long)
            )
        )


def test_kernels_take_the_tensors_of_the_format_in_its_order():
    assert Stored._fields == SUFFIXES
