"""The CUDA products of a decode step on the emulator: norms, residuals, several linears, experts."""

import ctypes

import pytest
import torch
from emulated import WIDTHS
from few_rows import FewRows, Routing, input_of, result_of, routing_of

import oracles_ops as oracle

pytestmark = pytest.mark.usefixtures("emulated")

MIXED = [(8, 32), (6, 32), (5, 64), (4, 96), (3, 64), (2, 80)]
K = sum(rows for _, rows in MIXED)
SEVERAL = [(MIXED, 160, 147), ([(4, 64), (3, 192), (2, 112)], 64, 64), ([(6, 96), (2, 272)], 96, 90)]
FFN, EXPERTS = 176, 6
FOLDED_ERROR = {8: 1e-5, 6: 1e-5, 5: 3e-5, 4: 3e-5, 3: 3e-5, 2: 1e-4}  # rms, of the output's


@pytest.fixture
def few(emulated):
    return FewRows(emulated)


def several(bias=True):
    return [
        (oracle.random_tensors(groups, n, seed, bias=bias, scale=0.5), width)
        for seed, (groups, n, width) in enumerate(SEVERAL)
    ]


def normalized(x, norm, layer_norm, eps=1e-5):
    x = x.double()
    x = x - x.mean(1, keepdim=True) if layer_norm else x
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * norm.double()


def exact(x, tensors, width):
    y = x.double() @ oracle.dequantize(tensors)[:, :width].double()
    return y + tensors["bias"][:width].double() if "bias" in tensors else y


def close(ours, wanted, bits):
    """Whether the rounding of activations to `bits` bits explains the difference."""
    return (ours.double() - wanted).abs().max() <= 2.0**-bits * wanted.abs().max() * 2


@pytest.mark.parametrize("folded", [0, 1])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "dtype", "parts", "bits"),
    [
        (1, torch.float16, 1, 10),
        (3, torch.bfloat16, 1, 10),
        (8, torch.float32, 1, 10),
        (4, torch.float32, 2, 19),
    ],
)
def test_a_norm_goes_before_three_linears_in_one_launch(few, tokens, dtype, parts, bits, layer_norm, folded):
    x = (torch.randn(tokens, K) * torch.logspace(-3, 3, tokens)[:, None] + 0.1).to(dtype)
    norm = torch.rand(K).to(torch.float16 if parts == 1 else torch.float32) + 0.5
    linears = several()
    whole = torch.full((tokens, 147 + 64 + 90), float("nan"))
    results = [result_of(part) for part in whole.split([147, 64, 90], dim=1)]
    few.linears(input_of(x, parts, norm, layer_norm, folded=folded), linears, results)
    states = normalized(x, norm, layer_norm)
    wanted = torch.cat([exact(states, *linear) for linear in linears], dim=1)
    assert close(whole, wanted, min(bits, 10) if folded else bits)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_number_of_rows_and_a_residual_in_place(few, tokens):
    x, (tensors, width) = torch.randn(tokens, K).half(), several()[0]
    y = torch.randn(tokens, width)
    wanted = y.double() + exact(x, tensors, width)
    few.linears(input_of(x), [(tensors, width)], [result_of(y, y)])
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_alone_over_many_blocks(few, bits):
    tensors = oracle.random_tensors([(bits, 1024)], 128, seed=bits, scale=0.5)
    x, y = torch.randn(2, 1024).half(), torch.empty(2, 128)
    few.linears(input_of(x), [(tensors, 128)], [result_of(y)])
    wanted = exact(x, tensors, 128)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def unrounded(tensors):
    """The weight [K, N] before its last rounding to half: code times scale, float64."""
    codes, widths, group = oracle.unpack(tensors)
    nibbles = torch.stack([(tensors["q_scale"] >> (4 * i)) & 15 for i in range(8)], dim=2)
    steps = nibbles.reshape(nibbles.shape[0], -1).half() + 1
    scale = (steps.square() * (tensors["q_scale_max"] / 256)[:, None]).double()
    signed = torch.from_numpy(codes - 2 ** (widths - 1)[:, None])
    return (signed * scale[torch.from_numpy(group)])[tensors["q_invperm"].long()]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_folded_weights_are_code_times_scale(few, bits, tokens):
    tensors = oracle.random_tensors([(bits, 1024)] if bits > 2 else [(2, 1008)], 96, seed=bits, scale=0.5)
    x, y = torch.randn(tokens, tensors["q_invperm"].numel()).half(), torch.empty(tokens, 96)
    few.linears(input_of(x, folded=1), [(tensors, 96)], [result_of(y)])
    wanted = x.double() @ unrounded(tensors)
    error = oracle.rms(y.double() - wanted) / oracle.rms(wanted)
    rounding = oracle.rms(x.double() @ oracle.dequantize(tensors).double() - wanted) / oracle.rms(wanted)
    print(f"{bits} bits, {tokens} tokens: folded {error:.1e}, halves {rounding:.1e}")
    assert error < FOLDED_ERROR[bits]


def random_experts(count=EXPERTS):
    return [
        tuple(
            oracle.random_tensors(
                [(WIDTHS[(e + role) % 5], 32), (2, k - 32)], n, seed=3 * e + role, scale=0.5
            )
            for role, (k, n) in enumerate(((K, 192), (K, 192), (FFN, 384)))
        )
        for e in range(count)
    ]


def experts_exact(states, index, weights, experts, activation="silu"):
    legal = torch.where((index >= 0) & (index < len(experts)), index.long(), len(experts))
    return oracle.experts(states.double(), legal, weights, experts, activation)


@pytest.mark.parametrize(
    "index",
    [
        [[3, 1]],
        [[0, 5], [5, 2], [1, 5]],
        [[-1, 2], [EXPERTS + 7, 0], [1, 1], [3, -9]],
        [[EXPERTS, EXPERTS]],
        [[4, 4]] * 8,  # 16 rows of one expert: two pieces
        [[t % 6, (t * 5 + 1) % 6] for t in range(8)],
    ],
    ids=str,
)
@pytest.mark.parametrize(("index_dtype", "folded"), [(torch.int64, 0), (torch.int32, 1)])
def test_routed_experts_take_two_launches_with_norm_and_residual(few, index, index_dtype, folded):
    index = torch.tensor(index, dtype=index_dtype)
    tokens, experts = len(index), random_experts()
    x, norm, weights = torch.randn(tokens, K), torch.rand(K).half() + 0.5, torch.rand(index.shape)
    y = torch.full((tokens, K), float("nan"))
    few.mlp(
        input_of(x, 1, norm, folded=folded),
        routing_of(index, weights, EXPERTS),
        experts,
        "silu",
        result_of(y, x),
    )
    wanted = x.double() + experts_exact(normalized(x, norm, False), index, weights, experts)
    assert close(y, wanted, 9)


def test_the_mlp_of_a_dense_model_is_one_expert_that_everybody_has(few):
    x, experts = torch.randn(5, K), random_experts(1)
    y = torch.empty(5, K, dtype=torch.bfloat16)
    routing = Routing(tokens=5, active=1, experts=1)
    few.mlp(input_of(x, 1), routing, experts, "gelu", result_of(y))
    wanted = experts_exact(x, torch.zeros(5, 1).long(), torch.ones(5, 1), experts, "gelu")
    assert close(y, wanted, 7)


@pytest.mark.parametrize("folded", [0, 1])
def test_no_schedule_changes_a_bit_and_every_launch_finds_its_workspace_ready(few, emulated, folded):
    experts, linears = random_experts(), several()
    index, weights = torch.tensor([[0, 5], [5, 2], [1, 5]]), torch.rand(3, 2)
    x, norm = torch.randn(3, K).bfloat16(), torch.ones(K)
    results = []
    for seed in range(5):
        emulated.dbrxq_emulator_seed(ctypes.c_uint64(seed))
        ys = [torch.empty(3, width) for _, width in linears]
        few.linears(input_of(x, 1, norm, folded=folded), linears, [result_of(y) for y in ys])
        y = torch.empty(3, K)
        few.mlp(
            input_of(x, 1, norm, folded=folded),
            routing_of(index, weights, EXPERTS),
            experts,
            "silu",
            result_of(y),
        )
        results.append(torch.cat([*ys, y], dim=1))
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_values_that_are_not_finite_stay_in_their_token(few):
    (tensors, width) = several(bias=False)[0]
    x = torch.zeros(3, K)
    x[0, 1], x[1, 2] = float("inf"), float("nan")
    x[2] = 1e-30
    y = torch.empty(3, width)
    few.linears(input_of(x), [(tensors, width)], [result_of(y)])
    assert not y[0].isfinite().any()
    assert y[1].isnan().all()
    assert torch.allclose(y[2].double(), exact(x[2:], tensors, width)[0], rtol=1e-3, atol=1e-33)
