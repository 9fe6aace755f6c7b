"""The router between the launches of a decode step on the emulator, against softmax and top-k of torch."""

import few_rows
import pytest
import torch

import oracles_ops as oracle

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("experts", "active", "power"), [(5, 2, 1.0), (40, 4, 0.0), (16, 4, 2.0)])
def test_experts_are_those_of_a_router_behind_the_product_before(
    experts, active, power, layer_norm, emulated
):
    tokens, hidden, ffn = 3, 160, 64
    few, kept = few_rows.FewRows(emulated), torch.zeros(tokens, hidden)
    first = oracle.random_tensors([(4, 64)], 160)
    norm, weight = torch.rand(hidden).half() + 0.5, torch.randn(experts, hidden).half()
    weight[1] = weight[0]  # of equals the first
    tiles = -(-hidden // 128)
    partial, constants = (
        torch.full((tokens, tiles, experts), float("nan")),
        torch.full((tiles, experts), float("nan")),
    )
    index, chosen = torch.full((tokens, active), -1), torch.full((tokens, active), float("nan"))
    router = few_rows.Router(
        weight=weight.data_ptr(),
        norm=norm.data_ptr(),
        layer_norm=layer_norm,
        experts=experts,
        expert_norm=power,
        partial=partial.data_ptr(),
        constants=constants.data_ptr(),
        index=index.data_ptr(),
        weights=chosen.data_ptr(),
    )
    attended = torch.randn(tokens, 64)
    residual = torch.randn(tokens, hidden) + 1
    given = few_rows.input_of(attended)
    few.linears(given, [(first, hidden)], [few_rows.result_of(kept, residual)], router)
    linears = [
        tuple(
            oracle.random_tensors([(3, k)], n, seed=e)
            for k, n in ((hidden, ffn), (hidden, ffn), (ffn, hidden))
        )
        for e in range(experts)
    ]
    y = torch.empty(tokens, hidden)
    few.mlp(
        few_rows.input_of(kept, norm=norm, layer_norm=layer_norm),
        few_rows.routing_of(index, chosen, experts),
        linears,
        "silu",
        few_rows.result_of(y),
        router,
    )
    x = kept.double()
    centred = x - x.mean(-1, keepdim=True) if layer_norm else x
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    weights, wanted = (normed @ weight.double().T).softmax(-1).topk(active)
    if power:
        weights = weights / weights.norm(p=power, dim=-1, keepdim=True)
    assert torch.allclose(chosen.double(), weights, rtol=1e-4)
    same = index == wanted
    assert (same | (index == 0) | (index == 1)).all()
    exact = oracle.experts(normed.float(), index, chosen, linears, "silu")
    assert oracle.rms(y.double() - exact) < 2e-3 * oracle.rms(exact)
