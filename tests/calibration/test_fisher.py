"""The streamed backward pass gives autograd's gradients, and what they price comes true."""

import pytest
import torch
from small_models import EXPERTS, random_tokens, save_model, whole_model
from torch import nn

from dbrx_quant.calibration.blocks import head as heads
from dbrx_quant.calibration.blocks import walk
from dbrx_quant.calibration.blocks.head import TOKENS_AT_ONCE, head_gradients
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import open_states
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.moments import Moments
from dbrx_quant.quantize.entries import Entry
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.runtime.families.facts import module_linears
from dbrx_quant.runtime.output.progress import Progress


class PlainExperts(nn.Module):
    """Experts as ordinary linears, token by token in the order of the experts."""

    def __init__(self, model, experts):
        super().__init__()
        self.parts = nn.ModuleList()
        for specs in experts.linears:
            part = nn.ModuleList(nn.Linear(*spec.shape, bias=False) for spec in specs)
            for linear, spec in zip(part, specs, strict=True):
                linear.weight.data = model.dense(spec).contiguous()
            self.parts.append(part)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = []
        for token, chosen, weights in zip(x, top_k_index, top_k_weights, strict=True):
            total = 0
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                gate, up, down = self.parts[expert]
                total = total + weight * down(nn.functional.silu(gate(token)) * up(token))
            rows.append(total)
        return torch.stack(rows).view_as(hidden_states)


def plain_model(folder):
    """transformers' whole model with plain experts, and the linear module of every spec."""
    streamed, model = StreamedModel(folder), whole_model(folder)
    modules = {}
    for block in streamed.architecture.blocks:
        for owner, specs in module_linears([s for stage in block.stages for s in stage]).items():
            modules |= {spec.name: (spec, model.get_submodule(owner)) for spec in specs}
        if block.experts:
            experts = PlainExperts(streamed, block.experts)
            model.set_submodule(block.experts.module, experts)
            for specs, part in zip(block.experts.linears, experts.parts, strict=True):
                modules |= {spec.name: (spec, linear) for spec, linear in zip(specs, part, strict=True)}
    head = streamed.architecture.head
    modules[head.name] = (head, model.get_submodule(head.module))
    return streamed, model, modules


def autograd_sums(model, modules, ids, labels):
    """Squared output gradients [N] of every linear, the gradient of the embeddings, by autograd alone."""
    sums = {name: torch.zeros(spec.shape[1], dtype=torch.float64) for name, (spec, _) in modules.items()}

    def hook(name, spec):
        begin, end = spec.outputs or (0, spec.shape[1])

        def see_output(_module, _inputs, output):
            def see_gradient(gradient):
                part = gradient[..., begin:end].reshape(-1, end - begin)
                sums[name] += part.double().square().sum(0)

            output.register_hook(see_gradient)

        return see_output

    for name, (spec, module) in modules.items():
        module.register_forward_hook(hook(name, spec))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    log_p = model(inputs_embeds=x).logits.float().log_softmax(-1)
    log_p.flatten(0, 1).gather(1, labels).sum().backward()
    return sums, x.grad


def measured(folder, ids, work, monkeypatch):
    """The measurement's entries, the labels it drew, and its model."""
    labels, draw = [], heads.draw_labels

    def recorded(*arguments, **options):
        labels.append(draw(*arguments, **options))
        return labels[-1]

    monkeypatch.setattr(heads, "draw_labels", recorded)
    job = MeasureJob(StreamedModel(folder), ids, work, Progress(), seed=6)
    result = measure(job)
    names = [spec.name for spec in job.model.architecture.linears()]
    return job, result, {n: Entry.read(job.entry(n)) for n in names}, torch.cat(labels)


@pytest.mark.parametrize("family", [*EXPERTS, "llama", "llama tied and biased", "qwen3"])
def test_the_streamed_gradients_are_those_of_autograd_through_the_whole_model(family, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", family, std=0.2)
    ids = random_tokens(4, 12)
    monkeypatch.setattr(walk, "ROWS_TOKENS", 24)  # two rows at a time
    monkeypatch.setattr(walk, "EXPERT_TOKENS", 5)
    job, _, entries, labels = measured(folder, ids, tmp_path / "work", monkeypatch)
    _, model, modules = plain_model(folder)
    sums, first = autograd_sums(model, modules, ids, labels)
    assert set(sums) == set(entries)
    if family in EXPERTS:
        assert sum(".experts." in name for name in sums) >= 12
    for name, expected in sums.items():
        assert entries[name].gradient == pytest.approx(float(expected.mean()), rel=3e-3), name
        assert entries[name].gradient > 0 or ".experts." in name
    assert (open_states(job.gradients(0))[:] - first).norm() <= 4e-3 * first.norm()


def test_gradients_reach_earlier_blocks_through_the_router(tmp_path, monkeypatch):
    """Without the routing weights' share, the gradients before the block would be others."""
    folder = save_model(tmp_path / "model", "dbrx", std=0.2)
    ids = random_tokens(2, 8)
    job, _, _, labels = measured(folder, ids, tmp_path / "work", monkeypatch)
    _, model, modules = plain_model(folder)
    for block in model.transformer.blocks:
        block.ffn.router.layer.register_forward_hook(lambda _m, _i, output: output.detach())
    _, without = autograd_sums(model, modules, ids, labels)
    difference = (open_states(job.gradients(0))[:] - without).abs().max()
    assert difference > 0.01 * without.abs().max()


def test_labels_are_drawn_from_the_model_and_by_the_seed(tmp_path):
    model = StreamedModel(save_model(tmp_path, "llama"))
    states = torch.randn(TOKENS_AT_ONCE + 7, 64, generator=torch.Generator().manual_seed(0))
    head = model.dense(model.architecture.head)
    results = {}
    with torch.no_grad():
        for run, seed in enumerate((1, 1, 2)):
            gradients = torch.full_like(states, float("nan"))
            total = head_gradients(model, states, gradients, head, seed)
            assert torch.isfinite(gradients).all()
            results[run] = gradients, total
        p = (model.final_norm(states) @ head.T).softmax(-1).double()
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    # E |onehot - p|^2 per channel is p (1 - p): the variance of one draw.
    expected = (p * (1 - p)).sum()
    assert float(results[0][1].columns.sum()) == pytest.approx(float(expected), rel=0.05)


def test_gradient_sums_are_per_channel_and_their_total_is_the_mean_over_channels():
    total = GradientSum.zero(3)
    total.add(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    total.add(torch.tensor([[[0.0, 0.0, 3.0]]]))
    assert total.columns.tolist() == [2, 4, 9]
    assert total.total == 5
    torch.testing.assert_close(total.column_weights(), 0.5 + 0.5 * torch.tensor([2, 4, 9]) / 5)
    assert GradientSum.zero(3).column_weights().tolist() == [1, 1, 1]


def kl_after(model, module, spec, error, ids, log_p):
    begin, end = spec.outputs or (0, spec.shape[1])
    dense = module.weight.data.clone()
    module.weight.data[begin:end] += error
    try:
        with torch.no_grad():
            changed = model(ids).logits.double().log_softmax(-1)
    finally:
        module.weight.data = dense
    return float((log_p.exp() * (log_p - changed)).sum(-1).mean())


def all_experts(config):
    """Every expert sees every token, so that no small error flips a choice of experts."""
    config.ffn_config.moe_top_k = config.ffn_config.moe_num_experts


@pytest.mark.parametrize(("family", "configure"), [("dbrx", all_experts), ("llama", None)])
def test_a_random_error_costs_its_price_within_a_quarter(family, configure, tmp_path, monkeypatch):
    """KL = gradients x mean |e|^2 / (2 T N) for a linear of every role, the mean over six errors each."""
    folder = save_model(tmp_path / "model", family, std=0.2, configure=configure)
    ids = random_tokens(16, 16)
    _, _, entries, _ = measured(folder, ids, tmp_path / "work", monkeypatch)
    _, model, modules = plain_model(folder)
    model.requires_grad_(False)
    log_p = model(ids).logits.double().log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for name, (spec, module) in modules.items():
        if spec.expert not in (None, 2):
            continue
        inputs = Moments.zero(spec.shape[0])
        handle = module.register_forward_hook(
            lambda _m, i, _o, inputs=inputs: inputs.add(i[0].reshape(-1, i[0].shape[-1]))
        )
        model(ids)
        handle.remove()
        actual = predicted = 0.0
        for _ in range(6):
            error = torch.randn(spec.shape[1], spec.shape[0], generator=generator)
            error *= 0.02 * module.weight.std()
            squares = float(((error @ inputs.matrix) * error).sum(dtype=torch.float64))
            predicted += entries[name].gradient * squares / inputs.tokens / (2 * ids.numel())
            actual += kl_after(model, module, spec, error, ids, log_p)
        ratios[name] = predicted / actual
    assert {spec.role for spec, _ in modules.values()} == {modules[name][0].role for name in ratios}
    outside = {name: round(ratio, 3) for name, ratio in ratios.items() if not 0.75 < ratio < 1.33}
    assert not outside, ratios


def test_labels_are_drawn_as_often_as_they_are_likely():
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0]).expand(20_000, 6)
    labels = heads.draw_labels(probabilities, torch.Generator().manual_seed(0))
    shares = torch.bincount(labels[:, 0], minlength=6) / len(labels)
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.02)
    assert shares[[0, 2, 5]].tolist() == [0, 0, 0]
