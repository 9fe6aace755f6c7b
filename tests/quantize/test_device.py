"""Another device computes what the CPU does, and meets no tensor that is still on the host."""

import dataclasses
import json
import os

import pytest
import torch
from far_device import FAR, MixedDevices, far_device
from places import TINY
from small_models import random_tokens, save_model, save_random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbrx_quant.calibration.blocks.head import distance, draw_labels, head_gradients
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import States, new_states, open_states
from dbrx_quant.calibration.blocks.walk import route, turns
from dbrx_quant.calibration.statistics.fisher import GradientSum
from dbrx_quant.calibration.statistics.held_out import HeldOutInputs
from dbrx_quant.calibration.statistics.moments import SplitMoments
from dbrx_quant.calibration.statistics.residual import ResidualMoments
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage, hessian
from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.budget.curve import draw, feedback_factors, held_out_ratio
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.estimate import memory
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.output.record import read_record
from dbrx_quant.quantize.solve.ldlq import factorize
from dbrx_quant.quantize.solve.linear import solve_linear
from dbrx_quant.quantize.solve.prepare import prepare, sampled_energy
from dbrx_quant.quantize.solve.refit import ResidualTarget, cross_moments, loss_of, refitted
from dbrx_quant.quantize.solve.repair import DEFAULT_REPAIR, repaired
from dbrx_quant.quantize.solve.shrinkage import choose_shrinkage
from dbrx_quant.runtime.exl2.format import uniform_groups
from dbrx_quant.runtime.kernels import float_matmul

CPU = torch.device("cpu")
K, N, TOKENS = 96, 64, 1024
ROWS = torch.arange(TOKENS) // 8  # of each token
FAMILIES = ["dbrx", "qwen2 moe", "qwen3 moe", "llama tied and biased"]


def both(compute):
    """What `compute` gives from tensors on the CPU, and from tensors on the device, brought back."""
    here = compute(CPU)
    with far_device():
        there = compute(FAR)
        back = [t.cpu() if isinstance(t, torch.Tensor) else t for t in there]
    return here, back


def same(here, there):
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, WEIGHTS = drawn(TOKENS, K) @ drawn(K, K, seed=1), drawn(TOKENS, seed=2).square()


def summed(device):
    """Moments of correlated inputs with routing weights."""
    moments = SplitMoments.zero(K, prior=True, device=device)
    moments.add(X.to(device), ROWS, WEIGHTS.to(device))
    moments.add_prior(drawn(100, K, seed=3).to(device))
    moments.check("these")
    return moments


def compared(device):
    """Moments with what the stream misses behind them."""
    moments = summed(device)
    residual = ResidualMoments(moments, K, N)
    missing = X @ drawn(K, N, seed=4) + drawn(TOKENS, N, seed=5)
    residual.add(X.to(device), missing.to(device), ROWS, WEIGHTS.sqrt().to(device))
    return residual


def test_the_equipment_refuses_tensors_of_two_devices():
    with far_device():
        here, there = torch.ones(3, 3), torch.ones(3, 3).to(FAR)
        assert there.device == FAR
        for mixed in (
            lambda: here + there,
            lambda: there[here.bool()],
            lambda: torch.addmm(there, there, here),
            lambda: here.index_add_(0, torch.arange(3).to(FAR), here),
            lambda: here + there.sum(),
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(MixedDevices, match="tensors of two devices"):
                mixed()
        assert float((there * torch.tensor(2.0)).sum()) == 18
        here[1:] = there[1:] * 2
        assert here.sum() == 3 + 12
    with pytest.raises(NotImplementedError):
        torch.ones(3).to(FAR)


def test_the_equipment_counts_memory_once():
    with far_device() as far:
        there = torch.ones(3, 3).to(FAR)
        doubled = there * 2
        view = there[1:].T
        assert (far.now, far.peak) == (72, 72)
        del there, doubled
        assert far.now == 36, "the view still holds it"
        del view
        assert (far.now, far.peak) == (0, 72)


def test_sums_over_tokens_are_the_cpus():
    def compute(device):
        moments, gradients = summed(device), GradientSum.zero(N, device)
        gradients.add(drawn(TOKENS, N).to(device))
        residual, held_out = compared(device), HeldOutInputs()
        held_out.add(drawn(50, K).to(device))
        error = held_out.error(drawn(K, 7).to(device))
        joined = moments.joined()
        matrices = [hessian(joined, moments.prior, Shrinkage(0.1, 0.5)), residual.fit, residual.selection]
        return [*matrices, gradients.column_weights(), gradients.total, joined.effective, error]

    same(*both(compute))


def test_a_hessian_of_no_tokens_is_on_the_device_too():
    same(*both(lambda device: [hessian(SplitMoments.zero(8, device=device).fit, None, Shrinkage(0.1))]))
    same(*both(lambda device: [GradientSum.zero(8, device).column_weights()]))


def test_shrinkage_factor_and_energy_are_the_cpus():
    def compute(device):
        moments, weight = summed(device), drawn(N, K).to(device)
        chosen = choose_shrinkage(weight, moments)
        matrix = hessian(moments.fit, moments.prior, chosen)
        energy = sampled_energy(weight, matrix)
        factor = factorize(matrix)
        prepared = prepare(matrix)
        return [chosen, energy, factor.unit_upper, factor.pivots, prepared.permutation]

    same(*both(compute))


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_a_solved_and_refitted_linear_is_the_cpus(effort):
    def compute(device):
        moments, weight = summed(device), drawn(N, K).to(device)
        shrinkage = Shrinkage(0.1, 0.5)
        joined = moments.joined()
        matrix = hessian(joined, moments.prior, shrinkage)
        tensors, loss = solve_linear(weight, prepare(matrix.clone()), uniform_groups(K, 3, 32), effort)
        target = ResidualTarget(weight, drawn(N, K, seed=6).to(device))
        cross = cross_moments(weight, matrix, target, joined, moments.prior, shrinkage)
        maxima = refitted(tensors, matrix, cross)
        assert all(tensor.device == CPU for tensor in (*tensors.values(), maxima))
        return [*tensors.values(), loss, maxima, loss_of(tensors, weight, matrix)]

    same(*both(compute))


def test_a_repaired_weight_is_the_cpus():
    here, there = both(lambda device: [repaired(drawn(N, K).to(device), compared(device), DEFAULT_REPAIR)])
    assert not torch.equal(here[0], drawn(N, K)), "repaired at all"
    same(here, there)


def test_a_curve_is_the_cpus():
    def compute(device):
        moments, weight, held_out = summed(device), drawn(200, K).to(device), HeldOutInputs()
        columns = drawn(200, seed=7).square().to(device)
        held_out.add(drawn(50, K).to(device))
        matrix = hessian(moments.joined(), None, Shrinkage(0.1))
        energy, prepared = sampled_energy(weight, matrix), prepare(matrix)
        factors = feedback_factors(weight, prepared, columns)
        curve = draw(weight, prepared, columns, energy, factors)
        return [factors, curve, held_out_ratio(weight, prepared, held_out)]

    same(*both(compute))


def test_states_are_read_and_written_from_the_device(tmp_path):
    def compute(device):
        path = tmp_path / f"{device.type}.safetensors"
        with new_states(path, (4, 8, K)) as states:
            states[1:] = drawn(3, 8, K).to(device)
        read = open_states(path, device)
        coded = States.scratch(tmp_path, (4, K))
        coded[1:3] = drawn(2, K).to(device)
        assert coded[:].device == CPU
        chosen = read.flat[torch.tensor([9, 30])]
        assert read[:].device == read.part(slice(2))[0].device == chosen.device == device
        return [read[:], chosen, coded[:]]

    same(*both(compute))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_its_experts_are_the_cpus(tmp_path, family):
    folder, ids = save_model(tmp_path, family), random_tokens(6, 16)

    def compute(device):
        model = StreamedModel(folder, device)
        live, states = model.block(0), model.embed(ids)
        output, middle = torch.empty_like(states), torch.empty_like(states)
        found = [live.without_mlp(states)]
        if live.spec.experts is None:
            return [*found, live(states)[0], *live.with_middle(states)]
        x = torch.empty_like(states.flatten(0, 1))
        routing = route(live, states, output, x, middle)
        assert routing.x.device == routing.index.device == routing.weight.device == CPU
        assert routing.device == live.routing.device == device
        for turn in turns(routing, live.spec.experts):
            turn.add_to(output.flatten(0, 1), turn.narrowed(model))
            found += [*turn.others(), turn.whole().x]
        return [*found, output, middle, x, routing.index, routing.weight]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        same(*both(compute))


def test_gradients_and_distances_of_the_head_are_the_cpus(tmp_path):
    folder, ids = save_model(tmp_path / "model", "dbrx"), random_tokens(6, 16)

    def compute(device):
        model, states = StreamedModel(folder, device), []
        for number in (0, 1):
            path = tmp_path / f"{device.type}-{number}"
            with new_states(path, (6, 16, 64)) as filled:
                filled[:] = drawn(6, 16, 64, seed=number)
            states.append(open_states(path, device))
        head, gradients = model.dense(model.architecture.head), torch.empty(96, 64)
        total = head_gradients(model, states[0].flat, gradients, head, seed=3)
        scores = distance(model, *states, head * 1.01, head, ids)
        labels = draw_labels(head.softmax(-1), torch.Generator().manual_seed(1))
        return [gradients, total.columns, total.total, scores, labels]

    with torch.no_grad():
        same(*both(compute))


def files(folder):
    """All that a conversion wrote but its record, which names the device."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}


def options(model, out, tokens, **changes):
    return ConvertOptions(model, out, (3.0,), calibration=str(tokens), quiet=True, **changes)


def convert_on_both(model, folder, tokens, **changes):
    """The files of a conversion on the CPU, and on the device."""
    with sdpa_kernel(SDPBackend.MATH):  # as on the device
        convert(options(model, folder / "here", tokens, **changes))
    with far_device():
        convert(options(model, folder / "there", tokens, device="lazy", **changes))
    return files(folder / "here"), files(folder / "there")


@pytest.mark.parametrize(
    "family",
    [
        "dbrx",
        "qwen3 moe",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2 moe", "llama tied and biased")),
    ],
)
def test_a_whole_conversion_has_the_cpus_bytes(tmp_path, family, one_thread):
    model = save_model(tmp_path / "model", family, std=0.2)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 96, 16)
    here, there = convert_on_both(model, tmp_path, tokens, refit=family == "dbrx")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_rounded_products_are_the_cpus_too(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("DBRXQ_PRODUCTS", "bfloat16")
    monkeypatch.setitem(float_matmul._ROUNDS_TO, FAR.type, float_matmul._ROUNDS_TO["cpu"])
    model = save_model(tmp_path / "model", "dbrx", std=0.2)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 48, 16)
    here, there = convert_on_both(model, tmp_path, tokens)
    assert here == there


@pytest.mark.slow
def test_a_conversion_of_the_trained_model_has_the_cpus_bytes(tmp_path, one_thread):
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 24, 128, vocabulary=256)
    here, there = convert_on_both(TINY, tmp_path, tokens)
    assert here == there


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, tokens, and room."""
    folder = tmp_path_factory.mktemp("device")
    tokens = save_random_tokens(folder / "tokens.safetensors", 24, 16)
    return save_model(folder / "model", "dbrx", std=0.2), tokens, folder


def test_the_device_is_in_the_record_and_the_cpu_goes_without_saying(small, tmp_path):
    model, tokens, _ = small
    chosen = options(model, tmp_path / "out", tokens, device="lazy")
    with far_device():
        convert(chosen)
    record = read_record(tmp_path / "out")
    assert record.settings["device"] == "lazy"
    assert "--device lazy" in record.command
    for device in ("cuda:1", "cuda"):
        chosen = options(model, tmp_path / "out", tokens, device=device)
        assert chosen.settings(3.0)["device"] == "cuda", "which of several is nobody's business"
        assert chosen.command(3.0).endswith("--device cuda")
    plain = options(model, tmp_path / "out", tokens)
    assert "device" not in plain.settings(3.0)
    assert "--device" not in plain.command(3.0)


@pytest.mark.parametrize(("first", "then"), [("cpu", "lazy"), ("lazy", "cpu")])
def test_work_is_not_resumed_on_another_device(small, tmp_path, monkeypatch, first, then):
    model, tokens, _ = small
    chosen = options(model, tmp_path / "out", tokens, device=first)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with far_device():
        with monkeypatch.context() as stopping:
            stopping.setattr(conversion, "_strategies", stop)
            with pytest.raises(KeyboardInterrupt):
                convert(chosen)
        with pytest.raises(ValueError, match=r"holds work of another conversion: device was .*lazy"):
            convert(dataclasses.replace(chosen, device=then))
        convert(chosen)


@pytest.mark.parametrize("verb", [convert, lambda chosen: measure_model(chosen, chosen.out)])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("toaster", "device toaster: torch cannot compute there"),
        ("meta", "device meta: torch cannot compute there"),
        ("lazy", "device lazy: torch cannot compute there"),
        ("cuda:77", "device cuda:77: torch cannot compute there"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(small, tmp_path, verb, name, told):
    model, tokens, _ = small
    with pytest.raises(ValueError, match=told):
        verb(options(model, tmp_path / "out", tokens, device=name))
    assert not list(tmp_path.iterdir())


def test_a_device_that_rounds_products_is_refused(small, tmp_path, monkeypatch):
    model, tokens, _ = small
    monkeypatch.setattr("dbrx_quant.runtime.kernels.device._trial_error", lambda device: 3e-4)
    with far_device(), pytest.raises(ValueError, match=r"device lazy: float32 products are off by 3\.0e-04"):
        convert(options(model, tmp_path / "out", tokens, device="lazy"))


def test_a_device_with_too_little_memory_is_refused_at_the_start(small, tmp_path, monkeypatch):
    model, tokens, _ = small
    monkeypatch.setattr(memory, "free_bytes", lambda device: 306_000_000 if device == FAR else None)
    for verb in (convert, lambda chosen: measure_model(chosen, tmp_path / "measured")):
        with far_device(), pytest.raises(ValueError, match=r"device lazy: about 0\.31 GB of its memory"):
            verb(options(model, tmp_path / "out", tokens, device="lazy"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400_000_000)
    with far_device():
        convert(options(model, tmp_path / "out", tokens, device="lazy"))


@pytest.mark.slow
@pytest.mark.parametrize(("length", "refit"), [(32, False), (128, True)])
def test_the_memory_of_the_device_is_what_the_estimate_says(tmp_path, monkeypatch, length, refit, one_thread):
    """DBRX's own shapes, and all that is there at a time, divided by 16."""
    places = ("calibration.blocks.walk", "calibration.blocks.head", "calibration.blocks.routing")
    places += ("quantize.first_pass", "quantize.estimate.memory", "calibration.statistics.held_out")
    for place in places:
        for name, most in (("ROWS_TOKENS", 128), ("EXPERT_TOKENS", 128), ("TOKENS_AT_ONCE", 32)):
            monkeypatch.setattr(f"dbrx_quant.{place}.{name}", most, raising=False)
        for name in ("HELD_OUT_TOKENS", "PRIOR_TOKENS"):
            monkeypatch.setattr(f"dbrx_quant.{place}.{name}", 128, raising=False)

    def shape(config):
        config.d_model, config.n_heads, config.n_layers, config.vocab_size = 384, 24, 1, 6272
        config.attn_config.kv_n_heads, config.max_seq_len = 4, 256
        config.ffn_config.hidden_size, config.ffn_config.ffn_hidden_size = 384, 672

    model = save_model(tmp_path / "model", "dbrx", std=0.02, configure=shape)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 1024 // length, length)
    expected = []

    def note(device, architecture, needs):
        expected.append(memory.device_bytes(architecture, needs) - memory.DEVICE_BASE_BYTES)

    monkeypatch.setattr(conversion, "check_device_memory", note)
    with far_device() as far:
        convert(options(model, tmp_path / "out", tokens, device="lazy", refit=refit))
    assert far.now == 0
    assert far.peak <= expected[0] <= 2 * far.peak


def test_work_of_versions_that_knew_no_device_goes_on(small, tmp_path):
    """The device of a work folder is only noted where it is another one than the CPU."""
    model, tokens, _ = small
    measure_model(options(model, tmp_path / "out", tokens), tmp_path / "measured.json")
    facts = json.loads((tmp_path / "out.work" / "job.json").read_text())["facts"]
    assert facts["device"] is None
    assert os.environ["DBRXQ_PRODUCTS"] == facts["products (DBRXQ_PRODUCTS)"]
