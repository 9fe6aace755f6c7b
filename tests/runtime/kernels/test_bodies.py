"""Bodies of repacked linears that lie elsewhere: the same results, no other bytes, none of others."""

import ctypes
import gc
import hashlib
import mmap

import numpy as np
import pytest
import torch

import oracles_ops as oracle
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.kernels import bodies, ops
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.kernels.bodies import Body, give_body
from dbrx_quant.runtime.kernels.repacked import checksum, repack, sizes
from dbrx_quant.runtime.kernels.stored import Stored
from dbrx_quant.runtime.kernels.structs import describe_linear
from dbrx_quant.runtime.library import _abi, _native
from dbrx_quant.runtime.model.linear import FusedLinear, QuantLinear

EVERY_WIDTH = [(8, 32), (6, 32), (5, 64), (4, 160), (3, 64), (2, 48)]


@pytest.fixture(params=["int8", "int16"])
def mode(request):
    with use_activations(request.param):
        yield request.param


def described(tensors, out_features):
    return describe_linear(Stored.of(tensors), tensors.get("bias"), out_features)


def copy_of(tensors):
    """The same linear in other tensors."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def owned(tensors):
    return [*Stored.of(tensors), *([tensors["bias"]] if "bias" in tensors else [])]


def given(tensors, out_features, change=lambda data: None, mapped=True):
    """A copy of a linear that uses a body of its own, changed by `change` after the checksum was taken."""
    block = repack(described(tensors, out_features))
    data = block.body.numpy().copy()
    change(data)
    made = copy_of(tensors)
    body = Body(data.ctypes.data, data.nbytes, checksum(block), mapped, data, "file: a linear")
    give_body(owned(made), out_features, body)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_given_body_gives_the_bits_of_one_made_from_the_stored_tensors(bias, tokens, isa, mode):
    tensors = oracle.random_tensors(EVERY_WIDTH, 96, bias=bias)
    x = torch.randn(tokens, 400)
    assert torch.equal(ops.linear(x, given(tensors, 80), 80), ops.linear(x, tensors, 80))


def test_given_bodies_give_the_bits_of_experts_that_are_repacked(isa, mode):
    linears = [
        [oracle.random_tensors([(4, 32), (2, k - 32)], n, seed=3 * e + r) for r, (k, n) in enumerate(SHAPES)]
        for e in range(4)
    ]
    x, weights = torch.randn(9, 64), torch.rand(9, 2)
    index = torch.randint(0, 5, (9, 2))
    expected = ops.experts(x, index, weights, *zip(*linears, strict=True))
    # an expert whose linears are in a file beside others that are not
    mixed = [
        [given(one, one["q_weight"].shape[1]) for one in own] if e % 2 else own
        for e, own in enumerate(linears)
    ]
    assert torch.equal(ops.experts(x, index, weights, *zip(*mixed, strict=True)), expected)


SHAPES = ((64, 96), (64, 96), (96, 64))


@pytest.mark.parametrize("place", [0, 0.01, 0.3, 0.77, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_changed_bit_is_an_error_that_names_the_linear_at_every_use(place, bit, mode):
    tensors = oracle.random_tensors(EVERY_WIDTH, 96)

    def flip(data):
        data[int(place * len(data)) if place >= 0 else -1] ^= 1 << bit

    damaged, x = given(tensors, 96, flip), torch.randn(1, 400)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="file: a linear: differs from its checksum"):
            ops.linear(x, damaged)
    layers = {name: QuantLinear.from_tensors(one) for name, one in (("a", tensors), ("b", damaged))}
    with pytest.raises(CheckpointError, match="file: a linear"):
        FusedLinear(layers)(x)


def test_an_expert_that_is_damaged_is_an_error_only_where_it_is_chosen(mode):
    linears = [[oracle.random_tensors([(3, k)], n, seed=e) for k, n in SHAPES] for e in range(3)]
    linears[1][2] = given(linears[1][2], 64, lambda data: data.__setitem__(100, data[100] ^ 4))
    x, weights = torch.randn(1, 64), torch.ones(1, 1)
    parts = list(zip(*linears, strict=True))
    for expert in (0, 2):
        ops.experts(x, torch.tensor([[expert]]), weights, *parts)
    with pytest.raises(CheckpointError, match="file: a linear"):
        ops.experts(x, torch.tensor([[1]]), weights, *parts)


@pytest.mark.parametrize("suffix", ["q_invperm", "q_scale_max", "bias"])
def test_a_body_of_another_linear_is_an_error(suffix, mode):
    tensors = oracle.random_tensors(EVERY_WIDTH, 96, bias=True)
    block, other = repack(described(tensors, 96)), copy_of(tensors)
    other[suffix] = other[suffix].flip(0).contiguous()
    body = Body(block.body.data_ptr(), block.body.numel(), checksum(block), True, block, "file: a linear")
    give_body(owned(other), 96, body)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        ops.linear(torch.randn(1, 400), other)


def test_a_body_of_another_size_is_an_error(mode):
    tensors = oracle.random_tensors(EVERY_WIDTH, 96)
    block = repack(described(tensors, 96))
    body = Body(
        block.body.data_ptr(), block.body.numel() - 64, checksum(block), True, block, "file: a linear"
    )
    give_body(owned(tensors), 96, body)
    with pytest.raises(CheckpointError, match="file: a linear"):
        ops.linear(torch.randn(1, 400), tensors)


def test_exact_products_do_not_look_at_a_body():
    tensors = oracle.random_tensors(EVERY_WIDTH, 96)
    damaged, x = given(tensors, 96, lambda data: data.fill(7)), torch.randn(2, 400)
    with use_activations("float"):
        assert torch.equal(ops.linear(x, damaged), ops.linear(x, tensors))


@pytest.mark.parametrize("replace", [False, True])
def test_a_linear_whose_tensors_have_changed_since_does_without_its_body(replace, mode):
    tensors = oracle.random_tensors(EVERY_WIDTH, 96)
    changed = given(tensors, 96)
    inverted = ~changed["q_weight"]
    if replace:
        changed["q_weight"].data = inverted
    else:
        changed["q_weight"].copy_(inverted)
    x = torch.randn(1, 400)
    assert torch.equal(ops.linear(x, changed), ops.linear(x, copy_of(changed)))


def test_a_body_goes_with_the_tensors_that_it_was_given_to(mode):
    gc.collect()
    before = len(bodies._bodies)
    made = given(oracle.random_tensors(EVERY_WIDTH, 96), 96)
    assert len(bodies._bodies) == before + 1
    del made
    gc.collect()
    assert len(bodies._bodies) == before


@pytest.mark.parametrize("tokens", [1, 2, 8, 40])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_bytes_of_a_body_are_nothing_outside_of_it_is_read(tokens, seed, isa, mode):
    """The body ends where memory begins that nobody may read; its checksum is that of its random bytes."""
    tensors = oracle.random_tensors(EVERY_WIDTH, 64, bias=True)
    struct, page = described(tensors, 64), mmap.PAGESIZE
    head_bytes, body_bytes = sizes(struct)
    room = -(-body_bytes // page) * page
    memory = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = np.frombuffer(memory, dtype=np.uint8)
    data[room - body_bytes : room] = np.random.default_rng(seed).integers(0, 256, body_bytes, np.uint8)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(data.ctypes.data + room, page, 0) == 0
    address = data.ctypes.data + room - body_bytes
    head = torch.empty(head_bytes, dtype=torch.uint8)
    found, library = ctypes.c_uint64(), _native.library()
    for expected in (0, None):  # the first head is only there to compute the checksum
        status = library.dbrxq_repacked_head(
            ctypes.byref(struct), address, found.value if expected is None else 0, 0, head.data_ptr()
        )
        _native.check(status, "head")
        _native.check(library.dbrxq_repacked_checksum(head.data_ptr(), ctypes.byref(found)), "checksum")
    body = Body(address, body_bytes, found.value, True, data, "file: a linear")
    give_body(owned(tensors), 64, body)
    assert ops.linear(torch.randn(tokens, 400), tensors, 64).shape == (tokens, 64)


def mix(sum, word):
    both = sum ^ word
    rotated = (both << 29 | both >> 35) & (2**64 - 1)
    return rotated * 0x9E3779B185EBCA87 % 2**64


def mix_all(sum, data):
    data = bytes(data)
    for word in np.frombuffer(data + bytes(-len(data) % 8), dtype="<u8").tolist():
        sum = mix(sum, word)
    return sum


def test_the_checksum_is_that_of_head_and_body_word_by_word():
    """Oracle: the loops of body.cpp in Python; a body of more than one part of 1 MiB would take minutes."""
    tensors = oracle.random_tensors([(4, 96), (2, 32)], 64, bias=True)
    block = repack(described(tensors, 64))
    body, seed = block.body.numpy(), 0xCBF29CE484222325
    permutation = np.argsort(tensors["q_invperm"].numpy()).astype("<i4")
    segments = [(4, 0, 0, 3, 0), (2, 1, 3, 1, 3 * 4 * 128)]
    steps = np.arange(1, 17, dtype=np.float32) ** 2
    largest = (tensors["q_scale_max"].float().numpy()[:, None] / np.float32(256)).astype(np.float16)
    tables = (steps * largest.astype(np.float32)).astype(np.float16).astype("<f4")
    sizes = np.array([128, 64, 64, 4, 2, 2, 3 * 4 * 128 + 2 * 128, len(body)], dtype="<i8")
    sum = mix_all(seed, sizes.tobytes())
    packed = b"".join(
        np.array(one[:4], "<i4").tobytes() + np.array(one[4:], "<i8").tobytes() for one in segments
    )
    for part in (packed, permutation.tobytes(), tables.tobytes()):
        sum = mix_all(sum, part)
    sum = mix_all(sum, tensors["bias"].float().numpy().astype("<f4").tobytes())
    lines = body.view("<u8").reshape(-1, 8)
    lanes = [mix_all(seed + lane, lines[:, lane].tobytes()) for lane in range(8)]
    of_body = mix_all(seed, np.array(lanes, dtype="<u8").tobytes())
    assert checksum(block) == mix_all(sum, np.array([of_body], dtype="<u8").tobytes())


def test_the_checksum_tells_apart_parts_that_have_changed_places():
    tensors = oracle.random_tensors([(4, 1024)], 8192)
    block = repack(described(tensors, 8192))
    before, data = checksum(block), block.body.numpy()
    assert len(data) > 4 << 20
    parts = data[: 2 << 20].reshape(2, -1)
    parts[:] = parts[::-1].copy()
    assert checksum(block) != before


def test_the_layout_is_that_of_its_version(isa):
    """Where this fails because the layout has changed on purpose, raise DBRXQ_LAYOUT_VERSION."""
    assert _abi.LAYOUT_VERSION == 1
    tensors = oracle.random_tensors(EVERY_WIDTH, 96, bias=True)
    block = repack(described(tensors, 80))
    assert hashlib.sha256(block.body.numpy().tobytes()).hexdigest()[:16] == "2d25be2072585468"
