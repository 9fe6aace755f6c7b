"""What experts add to the stream, and what each of them is to repair of what the stream misses."""

import pytest
import torch
from small_models import EXPERTS, random_tokens, save_model

from dbrx_quant.calibration.blocks.crew import Alone
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.shares import DenseShares, Missing, add_shares, shares_of
from dbrx_quant.calibration.blocks.states import States
from dbrx_quant.calibration.blocks.walk import add_dense_experts, route, turns

RANDOM = torch.Generator().manual_seed(3)


def coded(states, folder):
    """States as they are stored."""
    result = States.scratch(folder, states.shape)
    result[:] = states
    return result


@pytest.fixture(params=EXPERTS)
def block(request, tmp_path):
    """A block's experts, where its tokens go, and the stream without them."""
    model = StreamedModel(save_model(tmp_path / "model", request.param))
    with torch.no_grad():
        live, tokens = model.block(0), random_tokens(4, 16)
        stream, x = torch.zeros(4, 16, 64), torch.zeros(64, 64)
        routing = route(live, model.embed(tokens), stream, x)
        yield model, live.spec.experts, routing, stream.view(64, 64)


def dense_shares(block, folder):
    model, experts, routing, stream = block
    return Alone().each(DenseShares(model, 0, routing, len(stream), folder), turns(routing, experts))


def test_shares_kept_in_16_bits_add_up_to_what_the_experts_add(block, tmp_path):
    model, experts, routing, stream = block
    expected, found = stream.clone(), stream.clone()
    add_dense_experts(expected, model, experts, routing)
    for turn, result in dense_shares(block, tmp_path):
        add_shares(found, turn, States.of(result))
    assert (found - expected).abs().max() <= 2**-9 * (expected - stream).abs().max()
    for turn in turns(routing, experts):
        add_shares(found, turn, shares_of(turn, turn.narrowed(model), tmp_path), -1)
    torch.testing.assert_close(found, stream, rtol=1e-5, atol=1e-5)


def test_what_a_tokens_experts_are_to_repair_adds_up_to_what_the_stream_misses(block, tmp_path):
    model, experts, routing, stream = block
    goal = torch.randn(stream.shape, generator=RANDOM)
    dense = dense_shares(block, tmp_path)
    missing = Missing.behind(dense, routing.weight, stream, coded(goal, tmp_path), tmp_path)
    whole = stream.clone()
    add_dense_experts(whole, model, experts, routing)
    total = torch.zeros_like(stream)
    for turn in turns(routing, experts):
        for span in turn.spans():
            shares = missing.shares[turn.expert][span.part]
            aim = missing.aim(turn.expert, span, shares)
            total[span.index] += aim
            ratio = aim.norm(dim=1) / (goal - whole)[span.index].norm(dim=1)
            squares = routing.weight[span.index].square()
            torch.testing.assert_close(ratio, span.weight**2 / squares.sum(1), rtol=2e-2, atol=1e-3)
            spoilt = torch.randn(shares.shape, generator=RANDOM)
            torch.testing.assert_close(missing.aim(turn.expert, span, shares - spoilt), aim + spoilt)
    assert (total - (goal - whole)).norm() <= 2e-3 * (goal - whole).norm()


def test_a_token_whose_experts_have_no_weight_asks_nothing_of_them(block, tmp_path):
    _, experts, routing, stream = block
    weightless = type(routing)(routing.x, routing.index, torch.zeros_like(routing.weight))
    none = [(turn, vars(coded(torch.zeros(turn.count, 64), tmp_path))) for turn in turns(weightless, experts)]
    goal = coded(torch.randn(stream.shape, generator=RANDOM), tmp_path)
    missing = Missing.behind(none, weightless.weight, stream, goal, tmp_path)
    for turn in turns(weightless, experts):
        span = turn.whole()
        assert not missing.aim(turn.expert, span, torch.zeros(len(span.index), 64)).any()
