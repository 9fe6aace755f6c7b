"""The operators: results against fp64 oracles on every instruction set, refusals, the fallback."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles_ops as oracle
from dbrx_quant.runtime.kernels import cpu, ops, reference
from dbrx_quant.runtime.library import _native

SHAPES = {
    **oracle.SHAPES,
    "more rows than a panel": ([(5, 128), (3, 416), (2, 48)], 288),
}
TOKENS = (1, 2, 3, 4, 5, 8, 9, 33)
pytestmark = pytest.mark.usefixtures("seeded")


def assert_as_accurate_as_torch(ours, exact, plain, what=""):
    """Our rounding error may be at most twice that of plain torch in fp32, over all tokens together."""
    assert ours.shape == exact.shape
    limit = 2 * oracle.rms(plain.double() - exact) + 1e-30
    assert oracle.rms(ours.double() - exact) <= limit, what


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_as_accurate_as_fp32_matmul(shape, bias, isa):
    groups, n = SHAPES[shape]
    tensors = oracle.random_tensors(groups, n, bias=bias)
    k = sum(rows for _, rows in groups)
    generator = torch.Generator().manual_seed(1)
    ours, exact, plain = [], [], []
    for tokens in TOKENS:
        x = torch.randn(tokens, k, generator=generator)
        ours.append(ops.linear(x, tensors))
        exact.append(oracle.linear(x, tensors, n))
        plain.append(oracle.linear(x, tensors, n, torch.float32))
        assert torch.allclose(ours[-1].double(), exact[-1], rtol=1e-4, atol=1e-4), f"{tokens} tokens"
    assert_as_accurate_as_torch(torch.cat(ours), torch.cat(exact), torch.cat(plain))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_linear_multiplies_the_exact_weights_at_every_width(bits, isa):
    tensors = oracle.random_tensors([(bits, 32), (bits, 64)], 64, seed=bits, scale=0.5)
    weight = oracle.dequantize(tensors).float()
    eye = torch.eye(96)
    assert oracle.first_difference(ops.linear(eye, tensors), weight) is None  # decoded into panels
    for tokens in (1, 2, 4, 8):  # decoded into the sums
        rows = torch.cat([ops.linear(part, tensors) for part in eye.split(tokens)])
        assert oracle.first_difference(rows, weight) is None, f"{tokens} tokens"


@pytest.mark.parametrize("tokens", [1, 12])
def test_weights_that_overflow_half_become_infinite_as_the_format_says(tokens, isa):
    tensors = oracle.random_tensors([(8, 32), (4, 32), (2, 32)], 32)
    tensors["q_scale_max"].fill_(60000)
    x = torch.rand(tokens, 96)
    wanted = oracle.linear(x, tensors, 32, torch.float32)
    assert not wanted.isfinite().all()
    # Finite sums are of terms up to 65504, which cancel.
    assert torch.allclose(ops.linear(x, tensors), wanted, equal_nan=True, rtol=1e-5, atol=1.0)


def test_linear_trims_padded_columns(isa):
    tensors = oracle.random_tensors([(4, 64)], 96, bias=True)
    for tokens in (1, 20):
        x = torch.randn(tokens, 64)
        full = ops.linear(x, tensors)
        for width in (1, 31, 72, 95):
            assert torch.equal(ops.linear(x, tensors, width), full[:, :width])
            assert torch.equal(ops.dequantize(tensors, width), ops.dequantize(tensors)[:width])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((8, 6, 5, 4, 3, 2)), st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 128),
    st.integers(0, 2**16),
)
def test_linear_agrees_with_the_oracle_for_any_group_map(units, tokens, out_features, seed):
    groups = sorted(((bits, 32 * count) for bits, count in units), key=lambda g: -g[0])
    n = -(-out_features // 32) * 32
    tensors = oracle.random_tensors(groups, n, seed)
    x = torch.randn(tokens, sum(rows for _, rows in groups), generator=torch.Generator().manual_seed(seed))
    exact = oracle.linear(x, tensors, out_features)
    for name in oracle.ISAS:
        try:
            with _native.forced_isa(name):
                ours = ops.linear(x, tensors, out_features)
        except RuntimeError:
            continue  # this machine lacks it; the fixture `isa` reports that
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_round_only_at_the_edges(dtype):
    tensors = oracle.random_tensors([(4, 64)], 64)
    x = torch.randn(2, 3, 64).to(dtype)
    y = ops.linear(x, tensors)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 64)
    assert torch.equal(y, ops.linear(x.float(), tensors).to(dtype))


def test_linear_of_no_tokens_is_empty():
    assert ops.linear(torch.zeros(0, 64), oracle.random_tensors([(4, 64)], 32)).shape == (0, 32)


# ---- Experts ----------------------------------------------------------------------------------------------

D, F, E, A = 96, 160, 5, 2
ROUTINGS = {
    "one token": (1, lambda g: torch.tensor([[3, 1]])),
    "some experts without tokens": (7, lambda g: torch.randint(0, 2, (7, A), generator=g) * 3),
    "all tokens to one expert": (40, lambda g: torch.full((40, A), 2)),
    "300 tokens": (300, lambda g: torch.randint(0, E, (300, A), generator=g)),
    "some tokens without experts": (9, lambda g: torch.randint(0, E + 1, (9, A), generator=g)),
    "no expert at all": (3, lambda g: torch.full((3, A), E)),
    "more tokens than a pass": (600, lambda g: torch.randint(0, E + 1, (600, A), generator=g)),
}


def random_experts(count=E, same_order=False, hidden=D, ffn=F):
    linears = []
    for e in range(count):
        own = []
        for role, (k, n) in enumerate(((hidden, ffn), (hidden, ffn), (ffn, -(-hidden // 32) * 32))):
            groups = [(6, 32), (4, 32), (3, k - 64)] if e % 2 else [(4, k - 32), (2, 32)]
            own.append(oracle.random_tensors(groups, -(-n // 32) * 32, seed=10 * e + role, scale=0.05))
        if same_order:
            own[1]["q_invperm"] = own[0]["q_invperm"].clone()
        linears.append(tuple(own))
    return linears


def run_experts(x, index, weights, linears, activation="silu"):
    return ops.experts(x, index, weights, *zip(*linears, strict=True), activation)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_are_as_accurate_as_fp32_matmuls(routing, isa):
    generator = torch.Generator().manual_seed(3)
    tokens, route = ROUTINGS[routing]
    linears = random_experts(same_order=tokens % 2 == 0)
    x, weights = torch.randn(tokens, D, generator=generator), torch.rand(tokens, A, generator=generator)
    index = route(generator)
    ours = run_experts(x, index, weights, linears)
    exact = oracle.experts(x, index, weights, linears, "silu")
    plain = oracle.experts(x, index, weights, linears, "silu", torch.float32)
    assert_as_accurate_as_torch(ours, exact, plain, routing)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_activation_agrees_with_its_formula(activation):
    linears = random_experts(2)
    x, weights, index = torch.randn(11, D) * 3, torch.rand(11, A), torch.randint(0, 2, (11, A))
    ours = run_experts(x, index, weights, linears, activation)
    exact = oracle.experts(x, index, weights, linears, activation)
    assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_experts_trim_a_padded_hidden_size():
    # D = 80 is stored as 96 columns of `down`; K of gate and up is 80 by a 2-bit tail of 16 rows.
    linears = [
        tuple(
            oracle.random_tensors(groups, n, seed)
            for seed, (groups, n) in enumerate((([(4, 32), (2, 48)], 64), ([(2, 80)], 64), ([(3, 64)], 96)))
        )
    ]
    x, weights, index = torch.randn(5, 80), torch.rand(5, 1), torch.zeros(5, 1, dtype=torch.int64)
    ours = run_experts(x, index, weights, linears)
    assert torch.allclose(ours.double(), oracle.experts(x, index, weights, linears, "silu"), atol=1e-5)


def test_the_number_of_threads_changes_no_bit_of_the_experts_output():
    linears = random_experts()
    for tokens in (1, 50):
        x, weights, index = torch.randn(tokens, D), torch.rand(tokens, A), torch.randint(0, E, (tokens, A))
        results = []
        for threads in (1, 2, 5):
            _native.set_threads(threads)
            results.append(run_experts(x, index, weights, linears))
        _native.set_threads(0)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_the_pointer_table_of_experts_follows_their_memory():
    linears = random_experts(1)
    x, weights, index = torch.randn(2, D), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    before = run_experts(x, index, weights, linears)
    linears[0][2]["q_weight"].bitwise_not_()  # in place: same memory, same table, new numbers
    changed = run_experts(x, index, weights, linears)
    assert not torch.equal(before, changed)
    moved = [tuple({s: t.clone() for s, t in tensors.items()} for tensors in linears[0])]
    assert torch.equal(run_experts(x, index, weights, moved), changed)


# ---- Registration -----------------------------------------------------------------------------------------


def operator_arguments():
    tensors = oracle.random_tensors([(4, 64), (3, 32)], 64, bias=True)
    stored = [tensors[suffix] for suffix in oracle.SUFFIXES]
    linears = random_experts(2)
    lists = [[tensors[s] for tensors in role for s in oracle.SUFFIXES] for role in zip(*linears, strict=True)]
    routing = (torch.randint(0, 3, (4, A)), torch.rand(4, A))
    return {
        "dequantize": (ops.dequantize_op, (*stored, 50)),
        "linear": (ops.linear_op, (torch.randn(3, 96), *stored, None, 64)),
        "linear with bias": (ops.linear_op, (torch.randn(2, 3, 96).bfloat16(), *stored, tensors["bias"], 50)),
        "linears": (
            ops.linears_op,
            (torch.randn(2, 3, 96), [*stored, *stored], [None, tensors["bias"]], [64, 50]),
        ),
        "experts": (ops.experts_op, (torch.randn(4, D), *routing, *lists, "silu")),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck_passes(name):
    operator, arguments = operator_arguments()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", operator_arguments())
def test_reference_and_native_backends_agree(name):
    operator, arguments = operator_arguments()[name]
    function = operator.name().removeprefix("dbrxq::")
    wanted = ops.kernels(reference)[function](*arguments)
    ours = operator(*arguments)
    assert ours.dtype == wanted.dtype
    tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(ours.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def test_operators_run_without_gradients_and_backward_says_so():
    _, arguments = operator_arguments()["linear"]
    x = arguments[0].requires_grad_()
    y = ops.linear_op(x, *arguments[1:])
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(ops.linear_op(x, *arguments[1:]), y)


# ---- Refusals and the fallback ----------------------------------------------------------------------------

LINEAR_FAULTS = {
    "linear.q_weight: torch.float32": lambda x, t: (x, {**t, "q_weight": t["q_weight"].float()}),
    "linear.q_scale_max: torch.bfloat16": lambda x, t: (x, {**t, "q_scale_max": t["q_scale_max"].bfloat16()}),
    "linear.q_weight: not contiguous": lambda x, t: (
        x,
        {**t, "q_weight": t["q_weight"].t().contiguous().t()},
    ),
    "linear.q_scale: 8 words for 32 columns": lambda x, t: (
        x,
        {**t, "q_weight": t["q_weight"][:, :32].clone()},
    ),
    "linear.q_weight: 48 columns": lambda x, t: (x, {**t, "q_weight": t["q_weight"][:, :48].clone()}),
    "linear.q_groups: 2 entries for 2 groups": lambda x, t: (x, {**t, "q_groups": t["q_groups"][:2]}),
    "linear.q_scale: 1 rows for 2 groups": lambda x, t: (x, {**t, "q_scale": t["q_scale"][:1]}),
    "linear: x has 95 channels, the weight 96": lambda x, t: (x[:, :95], t),
    "linear.bias: 32 entries": lambda x, t: (x, {**t, "bias": t["bias"][:32]}),
    "linear: x: torch.int64": lambda x, t: (x.long(), t),
}


@pytest.mark.parametrize("message", LINEAR_FAULTS)
def test_malformed_linears_are_refused_with_the_reason(message):
    tensors = oracle.random_tensors([(4, 64), (3, 32)], 64, bias=True)
    x, broken = LINEAR_FAULTS[message](torch.randn(2, 96), tensors)
    with pytest.raises(ValueError, match=message):
        ops.linear(x, broken)


def test_output_features_beyond_the_stored_columns_are_refused():
    tensors = oracle.random_tensors([(4, 64)], 64)
    for width in (0, 65):
        with pytest.raises(ValueError, match=f"{width} output features"):
            ops.linear(torch.randn(1, 64), tensors, width)
        with pytest.raises(ValueError, match=f"{width} output features"):
            ops.dequantize(tensors, width)


def test_malformed_experts_are_refused_with_the_reason():
    linears = random_experts(2)
    x, index, weights = torch.randn(3, D), torch.zeros(3, A, dtype=torch.int64), torch.rand(3, A)
    gate, up, down = zip(*linears, strict=True)

    def refused(message, *arguments, activation="silu"):
        with pytest.raises(ValueError, match=message):
            ops.experts(*arguments, activation)

    refused("activation 'mish'", x, index, weights, gate, up, down, activation="mish")
    refused("an expert index is below 0 or above", x, index - 1, weights, gate, up, down)
    refused("an expert index is below 0 or above", x, index + 3, weights, gate, up, down)
    refused("routing of 2 tokens for 3", x, index[:2], weights, gate, up, down)
    refused("1 weights a token for 2 experts", x, index, weights[:, :1], gate, up, down)
    refused("expected 5 an expert", x, index, weights, gate, up[:1], down)
    refused("top_k_index is torch.float32", x, index.float(), weights, gate, up, down)
    refused("expert 0 gate: 96 input channels, expected 64", x[:, :64], index, weights, gate, up, down)
    refused("expert 0 up: 160 output features of 96", x, index, weights, gate, down, down)
    wrong = [{**down[0], "q_groups": down[0]["q_groups"] + 1}, down[1]]
    refused("q_groups is not a legal map", x, index, weights, gate, up, wrong)


@pytest.fixture
def missing_library(monkeypatch):
    def find():
        raise RuntimeError("libdbrxq_cpu.so is not here")

    for name in ("loaded", "_failure"):
        monkeypatch.setattr(_native.LIBRARY, name, None)
    monkeypatch.setattr(_native.LIBRARY, "find", find)
    cpu._warn_once.cache_clear()
    yield
    cpu._warn_once.cache_clear()


def test_without_the_library_plain_torch_runs_and_one_warning_names_the_reason(missing_library, caplog):
    tensors, linears = oracle.random_tensors([(4, 64), (3, 32)], 64, bias=True), random_experts(2)
    x, weights, index = torch.randn(3, D), torch.rand(3, A), torch.randint(0, 3, (3, A))
    with caplog.at_level(logging.WARNING):
        weight = ops.dequantize(tensors)
        y = ops.linear(torch.ones(2, 96), tensors)
        mixed = run_experts(x, index, weights, linears)
    assert not _native.available()
    assert oracle.first_difference(weight.t(), oracle.dequantize(tensors)) is None
    assert torch.allclose(y.double(), oracle.linear(torch.ones(2, 96), tensors, 64), atol=1e-5)
    assert torch.allclose(mixed.double(), oracle.experts(x, index, weights, linears, "silu"), atol=1e-5)
    assert [record.getMessage().count("libdbrxq_cpu.so is not here") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match="an expert index"):
        run_experts(x, index + 3, weights, linears)


def test_linears_refuse_lists_that_do_not_belong_together():
    tensors = oracle.random_tensors([(4, 96)], 64)
    stored = [tensors[suffix] for suffix in oracle.SUFFIXES]
    with pytest.raises(ValueError, match="5 tensors, 2 biases and 1 widths"):
        ops.linears_op(torch.randn(3, 96), stored, [None, None], [64])
