"""The interpreter's own claims: arithmetic to the last bit, what threads may do in shared memory, loops."""

import numpy as np
import pytest
import torch
from ptx_machine import Machine
from ptx_memory import watched
from ptx_order import flow_order
from ptx_text import PtxError

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"
FRAME = """.entry k(.param .u64 p0, .param .u64 p1)
{{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>;
 .shared .align 16 .b8 box[1024];
 ld.param.u64 %d1, [p0];
 ld.param.u64 %d2, [p1];
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %d3, %r1, 16;
 add.s64 %d4, %d1, %d3;
 add.s64 %d5, %d2, %d3;
 ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d4];
 {body}
 st.global.v4.u32 [%d5], {{%r10, %r11, %r12, %r13}};
 ret;
}}
"""
START = "mov.u32 %r10, %r4; mov.u32 %r11, %r5; mov.u32 %r12, %r6; mov.u32 %r13, %r7; "


def run(body, values, seed=0, target=80):
    """uint32 [threads, 4]: registers %r10..13 after a body, of threads that have `values` in %r4..7."""
    return launched(body, values, seed, target)[0]


def launched(body, values, seed=0, target=80):
    """The same, and what was counted."""
    machine = Machine([HEAD + FRAME.format(body=body)], target, seed)
    given, out = torch.from_numpy(values.view(np.int32)).clone(), torch.zeros(values.shape, dtype=torch.int32)
    with watched(machine.memory):
        arguments = np.array([given.data_ptr(), out.data_ptr()], np.uint64).tobytes()
        machine.launch("k", (1, 1, 1), (len(values), 1, 1), arguments)
    return out.numpy().view(np.uint32), machine.counts["k"]


def words(seed=0, threads=64):
    return np.random.default_rng(seed).integers(0, 2**32, (threads, 4), np.uint32)


def halves_of(column):
    return column.copy().view(np.float16).astype(np.float64)


def nearest_half(exact):
    with np.errstate(over="ignore"):
        return exact.astype(np.float16)


OPERATIONS = {
    "add.s32 %r10, %r4, %r5": lambda a, b, c: a + b,
    "sub.s32 %r10, %r4, 7": lambda a, b, c: a - np.uint32(7),
    "mul.lo.s32 %r10, %r4, %r5": lambda a, b, c: a * b,
    "mul.hi.s32 %r10, %r4, %r5": lambda a, b, c: (
        a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64) >> 32
    ).astype(np.uint32),
    "mad.lo.s32 %r10, %r4, %r5, %r6": lambda a, b, c: a * b + c,
    "shr.s32 %r10, %r4, 40": lambda a, b, c: np.where(
        a.view(np.int32) < 0, np.uint32(2**32 - 1), np.uint32(0)
    ),
    "shr.u32 %r10, %r4, 32": lambda a, b, c: a * 0,
    "shl.b32 %r10, %r4, 5": lambda a, b, c: a << np.uint32(5),
    "lop3.b32 %r10, %r4, %r5, %r6, 0xca": lambda a, b, c: (a & b) | (~a & c),
    "bfi.b32 %r10, %r4, %r5, 16, 8": lambda a, b, c: (
        (b & np.uint32(0xFF00FFFF)) | (a & np.uint32(255)) << np.uint32(16)
    ),
    "prmt.b32 %r10, %r4, %r5, 0x7410": lambda a, b, c: (
        (a & np.uint32(0xFFFF)) | (b & np.uint32(255)) << np.uint32(16) | b & np.uint32(0xFF000000)
    ),
    "popc.b32 %r10, %r4": lambda a, b, c: np.array([int(v).bit_count() for v in a], np.uint32),
    "div.s32 %r10, %r4, -7": lambda a, b, c: np.array([int(v / -7) for v in a.view(np.int32)]).astype(
        np.uint32
    ),
    "rem.s32 %r10, %r4, 9": lambda a, b, c: np.fmod(a.view(np.int32), 9).view(np.uint32),
    "shf.l.wrap.b32 %r10, %r4, %r5, 9": lambda a, b, c: b << np.uint32(9) | a >> np.uint32(23),
}


@pytest.mark.parametrize("instruction", OPERATIONS)
def test_integers_are_those_of_the_manual(instruction):
    values = words()
    ours = run(f"{START}{instruction};", values)[:, 0]
    assert (ours == OPERATIONS[instruction](values[:, 0], values[:, 1], values[:, 2])).all()


def test_pairs_of_halves_are_rounded_once():
    values = np.concatenate([words(seed, 512) for seed in range(4)])[:512]
    values[:256] &= 0xBFFFBFFF  # small ones, with subnormal results
    body = "mul.rn.f16x2 %r10, %r4, %r5; add.rn.f16x2 %r11, %r4, %r5; fma.rn.f16x2 %r12, %r4, %r5, %r6;"
    ours = run(START + body, values)
    a, b, c = (halves_of(values[:, i]) for i in range(3))
    with np.errstate(all="ignore"):
        results = (a * b, a + b, a * b + c)  # exact in float64
    for column, exact in enumerate(results):
        found, wanted = ours[:, column].copy().view(np.float16), nearest_half(exact)
        assert (np.isnan(found) == np.isnan(wanted)).all()
        numbers = ~np.isnan(wanted)
        assert (found[numbers].view(np.uint16) == wanted[numbers].view(np.uint16)).all()


def test_fused_floats_are_rounded_once():
    # 1 + 2^-23 times itself less 1 + 2^-22: what is left is the product's last bit alone.
    values = np.zeros((32, 4), np.uint32)
    values[:, :3] = np.array([1 + 2.0**-23, 1 + 2.0**-23, -(1 + 2.0**-22)], np.float32).view(np.uint32)
    sources = "mov.b32 %f1, %r4; mov.b32 %f2, %r5; mov.b32 %f3, %r6;"
    body = f"{sources} fma.rn.f32 %f4, %f1, %f2, %f3; mov.b32 %r10, %f4;"
    assert (run(START + body, values)[:, 0].view(np.float32) == 2.0**-46).all()


@pytest.mark.parametrize(("shape", "k"), [("m16n8k16", 16), ("m16n8k8", 8)])
def test_a_product_of_fragments_is_that_of_the_matrices(shape, k):
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 8, (16, k)), rng.integers(-8, 8, (k, 8))
    packed = np.zeros((32, 8), np.uint32)  # a of each lane, then b, by the pictures of the manual
    for lane in range(32):
        g, t = divmod(lane, 4)
        pairs = [(a[g], 0), (a[g + 8], 0), (a[g], 8), (a[g + 8], 8)][: k // 4]
        left = [row[2 * t + at : 2 * t + at + 2] for row, at in pairs]
        right = [b[2 * t + at : 2 * t + at + 2, g] for at in (0, 8)[: k // 8]]
        for i, pair in enumerate([*left, *right]):
            packed[lane, i] = np.array(pair, np.float16).view(np.uint32)[0]
    count, halves = k // 4, k // 8
    values = np.concatenate([packed[:, :4], packed[:, 4:]])  # the second warp brings the rest
    fetch = "add.s64 %d6, %d4, 512; ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%d6];"
    registers = ["%r4", "%r5", "%r6", "%r7", "%r20", "%r21"]
    left, right = ",".join(registers[:count]), ",".join(registers[count : count + halves])
    sums = "{%f1,%f2,%f3,%f4}"
    zero = " ".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(1, 5))
    back = " ".join(f"mov.b32 %r{9 + i}, %f{i};" for i in range(1, 5))
    product = f"mma.sync.aligned.{shape}.row.col.f32.f16.f16.f32 {sums}, {{{left}}}, {{{right}}}, {sums};"
    first_warp = f"{fetch} {zero} {product} {back}"
    body = f"setp.gt.u32 %p1, %r1, 31; @%p1 bra DONE; {first_warp} bra.uni END; DONE: {START} END: "
    ours = run(body, values)[:32].view(np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        wanted = a @ b
        assert (ours[lane] == [*wanted[g, 2 * t : 2 * t + 2], *wanted[g + 8, 2 * t : 2 * t + 2]]).all()


# ---- Threads ---------------------------------------------------------------------------------------------

PLACE = "mov.u32 %r20, box; shl.b32 %r21, %r1, 2; add.s32 %r22, %r20, %r21; xor.b32 %r23, %r21, 128; "
EXCHANGE = PLACE + "add.s32 %r24, %r20, %r23; st.shared.u32 [%r22], %r4; {} ld.shared.u32 %r10, [%r24];"


def test_threads_exchange_words_across_a_barrier():
    values = words()
    ours = run(START + EXCHANGE.format("bar.sync 0;"), values)
    assert (ours[:, 0] == values[np.arange(64) ^ 32, 0]).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (EXCHANGE.format(""), "reads what another thread wrote"),
        (PLACE + "ld.shared.u32 %r10, [%r20]; st.shared.u32 [%r22], %r4;", "writes what another thread read"),
        (PLACE + "st.shared.u32 [%r20], %r4;", "write at once"),
        (PLACE + "st.shared.v2.u32 [%r22], {%r4, %r5};", "not aligned to 8"),
        (PLACE + "st.shared.u32 [%r22+1000], %r4;", "outside of the block's 1024 bytes"),
        ("add.s64 %d6, %d4, 1024; ld.global.u32 %r10, [%d6];", "outside of live tensors"),
        ("add.s64 %d6, %d4, 2; ld.global.u32 %r10, [%d6];", "not aligned to 4"),
        (
            "mov.u32 %r20, box; shl.b32 %r21, %r1, 4; add.s32 %r22, %r20, %r21; "
            "cp.async.cg.shared.global [%r22], [%d4], 16; cp.async.commit_group; cp.async.wait_group 1; "
            "ld.shared.u32 %r10, [%r22]; cp.async.wait_group 0;",
            "copy is under way",
        ),
        (
            "mov.u32 %r20, box; shl.b32 %r21, %r1, 4; add.s32 %r22, %r20, %r21; "
            "cp.async.cg.shared.global [%r22], [%d4], 16;",
            "ends with copies under way",
        ),
        ("setp.gt.u32 %p1, %r1, 7; @%p1 bar.sync 0;", "by part of a warp"),
        ("setp.gt.u32 %p1, %r1, 7; @%p1 vote.sync.ballot.b32 %r10, %p1, -1;", "by part of a warp"),
        ("ld.global.nc.u32 %r10, [%d5];", "loads as read-only"),
        ("LOOP: bra.uni LOOP;", "does not end"),
        ("tex.1d.v4.s32.s32 %r10, [%d4], %r4;", "tex.1d.v4.s32.s32"),
        ("frob.u32 %r10, %r4;", "frob.u32: is not known"),
    ],
)
def test_what_a_kernel_must_not_do_is_an_error(body, message, monkeypatch):
    monkeypatch.setattr("ptx_machine._STEPS", 1000)
    with pytest.raises(PtxError, match=message):
        run(START + body, words())


@pytest.mark.parametrize(("shift", "wavefronts"), [(0, 1), (2, 1), (3, 2), (5, 8)])
def test_conflicts_of_banks_are_counted(shift, wavefronts):
    values = words(threads=32)
    place = (
        f"mov.u32 %r20, box; shl.b32 %r21, %r1, {shift}; and.b32 %r21, %r21, -4; add.s32 %r22, %r20, %r21;"
    )
    _, counts = launched(f"{START} {place} ld.shared.u32 %r10, [%r22];", values)
    assert counts["shared wavefronts"] == wavefronts
    assert counts["shared wavefronts, ideal"] == 1
    assert counts["shared reads of what nobody wrote"] == 32


def test_sectors_and_instructions_are_counted():
    scattered = (
        "mul.wide.u32 %d6, %r1, 28; and.b64 %d6, %d6, 508; add.s64 %d6, %d1, %d6; ld.global.u32 %r10, [%d6];"
    )
    _, counts = launched(START + scattered, words(threads=32))
    touched = {(28 * thread & 508) // 32 for thread in range(32)}
    assert counts["loaded sectors"] == 32 * 16 // 32 + len(touched)
    assert counts["loaded sectors, ideal"] == 16 + 32 * 4 // 32
    assert counts["instructions ld.global"] == 2
    assert counts["instructions mul"] == 2


def test_instructions_of_later_targets_are_refused():
    with pytest.raises(PtxError, match="needs sm_80"):
        run(START + "cp.async.commit_group;", words(), target=75)


def test_lanes_of_a_warp_need_a_barrier_of_the_warp_alone():
    values = words(threads=32)
    swap = PLACE + "xor.b32 %r24, %r22, 4; st.shared.u32 [%r22], %r4; {} ld.shared.u32 %r10, [%r24];"
    ours = run(START + swap.format("bar.warp.sync -1;"), values)
    assert (ours[:, 0] == values[np.arange(32) ^ 1, 0]).all()
    with pytest.raises(PtxError, match="another thread wrote"):
        run(START + swap.format(""), values)


def test_loops_of_different_lengths_meet_again():
    body = (
        "and.b32 %r20, %r1, 7; mov.u32 %r10, 0; LOOP: setp.eq.u32 %p1, %r20, 0; @%p1 bra AFTER; "
        "add.s32 %r10, %r10, %r20; sub.s32 %r20, %r20, 1; bra.uni LOOP; "
        "AFTER: vote.sync.ballot.b32 %r11, %p1, -1;"
    )
    ours = run(START + body, words())
    n = np.arange(64) % 8
    assert (ours[:, 0] == n * (n + 1) // 2).all()
    assert (ours[:, 1] == 0xFFFFFFFF).all()


def test_loops_come_before_what_follows_them():
    #        0 → 1 ⇄ 3, 1 → 2 (after the loop), 3 → 4 → 3 (a loop in it)
    assert flow_order([[1], [2, 3], [], [1, 4], [3]]) == [0, 1, 3, 4, 2]
