"""Moments are the sums they are said to be, and a Hessian is always fit to be factorised."""

import pytest
import torch
from small_models import save_model

from dbrx_quant.calibration.blocks.model import Routing, StreamedModel
from dbrx_quant.calibration.blocks.routing import PRIOR_TOKENS, coverage, tokens_of
from dbrx_quant.calibration.blocks.walk import Turn
from dbrx_quant.calibration.statistics import moments
from dbrx_quant.calibration.statistics.moments import (
    SELECTION_EVERY,
    Moments,
    SplitMoments,
    is_selection,
)
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian, own_share
from dbrx_quant.quantize.solve.ldlq import factorize
from dbrx_quant.runtime.families.facts import LinearSpec


def tokens(count, k, seed=0):
    return torch.randn(count, k, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, k)


def filled(x, weights=None):
    moments = Moments.zero(x.shape[1])
    moments.add(x, weights)
    return moments


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_added_in_parts_are_the_weighted_sums_in_float64(weighted):
    x, weights = tokens(500, 24), torch.rand(500, generator=torch.Generator().manual_seed(1))
    moments = Moments.zero(24)
    for start, stop in ((0, 0), (0, 1), (1, 200), (200, 500)):
        moments.add(x[start:stop], weights[start:stop] if weighted else None)
    w = weights.double() if weighted else torch.ones(500, dtype=torch.float64)
    exact = (x.double().T * w) @ x.double()
    scale = (exact.diagonal()[:, None] * exact.diagonal()[None]).sqrt()
    assert ((moments.matrix.double() - exact).abs() / scale).max() < 1e-5
    assert moments.weight == pytest.approx(float(w.sum()))
    assert moments.squares == pytest.approx(float(w.square().sum()))
    assert moments.tokens == 500
    assert moments.effective == pytest.approx(float(w.sum() ** 2 / w.square().sum()))


@pytest.mark.parametrize("k", [7, 8, 9, 24, 29])
def test_moments_of_many_channels_are_made_of_one_triangle(k, monkeypatch):
    monkeypatch.setattr(moments, "_COLUMNS", 8)
    x, weights = torch.randn(2, 50, k), torch.rand(2, 50)
    found = Moments.zero(k)
    for part in range(2):
        found.add(x[part], weights[part])
        expected = torch.einsum("st,stk,stl->kl", weights[: part + 1], x[: part + 1], x[: part + 1])
        torch.testing.assert_close(found.matrix, expected)
        torch.testing.assert_close(found.matrix, found.matrix.T)


def test_moments_of_rounded_inputs_are_those_of_other_inputs_near_them(monkeypatch):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    x, weights = torch.randn(300, 40), torch.rand(300)
    found = Moments.zero(40)
    found.add(x, weights)
    exact = (weights[:, None] * x).T @ x
    assert (found.matrix - exact).norm() <= 2e-3 * exact.norm()
    rounded = (x * weights.sqrt()[:, None]).bfloat16().float()
    if (found.matrix - exact).norm() > 1e-5 * exact.norm():  # else this CPU does not round
        torch.testing.assert_close(found.matrix, rounded.T @ rounded, rtol=1e-4, atol=1e-4)


def test_the_hessian_of_equal_weights_is_the_mean_of_x_xt():
    x = tokens(300, 16)
    mean = x.double().T @ x.double() / 300
    result = hessian(filled(x), None, Shrinkage(0.0)).double()
    ridge = 1e-4 * float(mean.diagonal().mean())  # what keeps dead channels from being free
    torch.testing.assert_close(result, mean + ridge * torch.eye(16), rtol=1e-5, atol=1e-5)


def test_the_weights_of_an_experts_tokens_are_its_squared_routing_weights():
    """Its share of the block's output error is tr(E^T H E) x the sum of those weights."""
    generator = torch.Generator().manual_seed(3)
    x, index = (
        torch.randn(6, 8, generator=generator),
        torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0]]),
    )
    weight = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.8, 0.2], [0.6, 0.4], [1.0, 0.0]])
    mine = tokens_of(Routing(x, index, weight), 1)
    assert mine.index.tolist() == [0, 1, 2, 3]
    assert mine.slot.tolist() == [1, 0, 0, 1]
    assert torch.equal(mine.weight, torch.tensor([0.1, 0.7, 0.5, 0.2]))
    assert mine.others.tolist() == [4, 5]
    moments = filled(x[mine.index], mine.weight.square())
    by_hand = (
        0.01 * x[0].outer(x[0]) + 0.49 * x[1].outer(x[1]) + 0.25 * x[2].outer(x[2]) + 0.04 * x[3].outer(x[3])
    )
    torch.testing.assert_close(moments.matrix, by_hand)
    assert moments.weight == pytest.approx(0.79)

    error = 0.1 * torch.randn(5, 8, generator=generator)  # of a weight [N, K]
    share = sum(p * p * (error @ x[t]).square().sum() for t, p in ((0, 0.1), (1, 0.7), (2, 0.5), (3, 0.2)))
    torch.testing.assert_close(((error @ moments.matrix) * error).sum(), share)


def test_the_measured_tokens_of_an_expert_are_those_that_the_model_routes_to_it(tmp_path):
    """Every choice of every token belongs to one expert, and their weighted outputs are the block's."""
    model = StreamedModel(save_model(tmp_path, "mixtral", std=0.3))
    with torch.no_grad():
        _, routing = model.block(0)(model.embed(torch.arange(60).view(2, 30)))
    parts = [tokens_of(routing, expert) for expert in range(4)]
    pairs = [(int(t), int(s)) for part in parts for t, s in zip(part.index, part.slot, strict=True)]
    assert sorted(pairs) == [(t, s) for t in range(60) for s in range(2)]
    for part in parts:
        assert sorted([*part.index.tolist(), *part.others.tolist()]) == list(range(60))


def test_tokens_of_others_are_a_limited_even_spread():
    index = torch.ones(5 * PRIOR_TOKENS, 1, dtype=torch.long)
    others = tokens_of(Routing(torch.empty(0), index, index.float()), 0).others
    assert len(others) == PRIOR_TOKENS
    assert others[0] == 0
    assert others[-1] == 5 * PRIOR_TOKENS - 1
    steps = others.diff()
    assert steps.min() >= 4
    assert steps.max() <= 6


def test_coverage_counts_tokens_and_shares():
    routing = Routing(
        torch.empty(0),
        torch.tensor([[0, 1], [0, 1], [0, 3]]),
        torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]),
    )
    rows = coverage(routing, 4)
    assert [row.tokens for row in rows] == [3, 2, 0, 1]
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert rows[0].mean_weight == pytest.approx(0.75)
    assert rows[2].mean_weight == 0


def test_an_experts_output_is_the_gated_product():
    x, gate, up, down = tokens(3, 4), tokens(6, 4, 1), tokens(6, 4, 2), tokens(4, 6, 3)
    exact = torch.stack(
        [down @ (torch.nn.functional.silu(gate @ token) * (up @ token)) for token in x.unbind()]
    )
    specs = [LinearSpec(f"e.{role}", role, "", None, (4, 6), ()) for role in ("gate", "up", "down")]
    routing = Routing(x, torch.tensor([[1], [0], [1]]), torch.tensor([[0.5], [1.0], [0.25]]))
    turn, stream = Turn(1, *specs, routing, torch.nn.functional.silu), torch.zeros(3, 4)
    turn.add_to(stream, (gate, up, down))
    torch.testing.assert_close(stream, torch.tensor([[0.5], [0.0], [0.25]]) * exact)


def test_selection_rows_are_disjoint_from_fit_rows_and_joined_gives_all():
    rows = torch.arange(3 * SELECTION_EVERY).repeat_interleave(5)
    x, weights = tokens(len(rows), 12), torch.rand(len(rows), generator=torch.Generator().manual_seed(2))
    split = SplitMoments.zero(12)
    for part in (slice(0, 33), slice(33, None)):  # the parts need not respect rows
        split.add(x[part], rows[part], weights[part])
    mask = is_selection(rows)
    assert mask.sum() == 3 * 5
    for row in rows.unique():
        assert len(mask[rows == row].unique()) == 1, "a row is on one side as a whole"
    torch.testing.assert_close(split.fit.matrix, filled(x[~mask], weights[~mask]).matrix)
    torch.testing.assert_close(split.selection.matrix, filled(x[mask], weights[mask]).matrix)
    assert split.fit.tokens + split.selection.tokens == len(rows)
    joined, whole = split.joined(), filled(x, weights)
    torch.testing.assert_close(joined.matrix, whole.matrix, rtol=1e-5, atol=1e-4)
    assert (joined.tokens, joined.weight) == (whole.tokens, pytest.approx(whole.weight))
    assert joined.effective == pytest.approx(whole.effective)


@pytest.mark.parametrize("damping", [0.01, 0.2, 0.4])
def test_shrinkage_scales_what_is_off_the_diagonal_and_keeps_the_diagonal(damping):
    x = tokens(20, 32)
    plain, shrunk = (hessian(filled(x), None, Shrinkage(d)) for d in (0.0, damping))
    torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
    off = ~torch.eye(32, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], (1 - damping) * plain[off])


def test_a_hessian_of_fewer_tokens_than_channels_can_be_factorised():
    shrunk = hessian(filled(tokens(5, 64)), None, Shrinkage(0.01))
    assert factorize(shrunk).pivots.min() > 0


def test_a_dead_channel_still_costs_something():
    x = tokens(100, 16)
    x[:, 3] = 0
    result = hessian(filled(x), None, Shrinkage(0.01))
    assert result[3, 3] > 0
    assert (result[3, torch.arange(16) != 3] == 0).all()
    assert factorize(result).pivots.min() > 0


def test_an_expert_without_tokens_gets_the_prior():
    prior = filled(tokens(50, 8))
    result = hessian(Moments.zero(8), prior, Shrinkage(0.0, 0.0))
    torch.testing.assert_close(result, hessian(prior, None, Shrinkage(0.0)))


@pytest.mark.parametrize("prior", [None, Moments.zero(8)])
def test_without_any_tokens_the_hessian_is_the_identity(prior):
    assert torch.equal(hessian(Moments.zero(8), prior, Shrinkage(0.2, 0.5)), torch.eye(8))


def test_inputs_that_are_all_zero_give_the_identity():
    assert torch.equal(hessian(filled(torch.zeros(10, 8)), None, Shrinkage(0.1)), torch.eye(8))


def test_the_prior_counts_as_many_tokens_a_channel_as_asked_for():
    own, prior = filled(tokens(30, 8)), filled(tokens(70, 8, 1))
    expected = (30 * own.matrix / 30 + 0.5 * 8 * prior.matrix / 70) / (30 + 0.5 * 8)
    result = hessian(own, prior, Shrinkage(0.0, 0.5))
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(result[off], expected[off])
    assert torch.equal(hessian(own, prior, Shrinkage(0.0, 0.0)), hessian(own, None, Shrinkage(0.0)))


@pytest.mark.parametrize("mirrored_before", [False, True])
def test_hessians_of_sums_right_of_the_diagonal_are_those_of_whole_sums(mirrored_before):
    count, k, rows = 24, 2600, torch.arange(24)  # more than two spans of columns, and tiles that are cut
    split = SplitMoments.zero(k, prior=True)
    split.add(tokens(count, k), rows)
    split.add_prior(tokens(count, k, 1))
    if mirrored_before:
        assert torch.equal(split.selection.matrix, split.selection.matrix.T)
    x, rest = tokens(count, k), is_selection(rows)
    own, prior = filled(x[~rest]).matrix + filled(x[rest]).matrix, filled(tokens(count, k, 1)).matrix
    joined = split.joined()
    share = own_share(joined, split.prior, Shrinkage(0.1, 0.5))
    expected = ((own / count).mul(share).add(prior, alpha=(1 - share) / count)).mul(1 - 0.1)
    result = hessian(joined, split.prior, Shrinkage(0.1, 0.5))
    off = ~torch.eye(k, dtype=torch.bool)
    assert torch.equal(result[off], expected[off])
    assert torch.equal(joined.matrix, own)


def test_making_a_hessian_leaves_the_moments_as_they_are():
    own, prior = filled(tokens(30, 8)), filled(tokens(70, 8, 1))
    before = own.matrix.clone(), prior.matrix.clone()
    hessian(own, prior, Shrinkage(0.2, 0.5))
    assert torch.equal(own.matrix, before[0])
    assert torch.equal(prior.matrix, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["fit", "selection", "prior"])
def test_an_input_that_is_not_finite_raises_with_the_linear_and_the_channel(part, value):
    split = SplitMoments.zero(8, prior=True)
    x = tokens(4, 8)
    split.add(x, torch.tensor([0, 1, SELECTION_EVERY - 1, 2]))
    split.check("model.layers.0.self_attn.q_proj")
    x[1, 5] = value
    getattr(split, part).add(x)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: .*NaN or infinity \(input channel 5\)"
    ):
        split.check("model.layers.0.self_attn.q_proj")


def test_an_input_that_overflows_when_squared_raises():
    moments = filled(torch.full((2, 8), 1e30))
    with pytest.raises(ValueError, match=r"lm_head: .*input channel 0"):
        moments.check("lm_head")
