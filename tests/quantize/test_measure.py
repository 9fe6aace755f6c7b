"""The measurement counts what it says, whatever the batches, and knows what it has done already."""

import pytest
import torch
from small_models import EXPERTS, random_tokens, run_block, save_model

from dbrx_quant.calibration.blocks import walk
from dbrx_quant.calibration.blocks.crew import Alone
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.states import open_states
from dbrx_quant.calibration.blocks.walk import batches, route, spans, token_rows
from dbrx_quant.calibration.statistics import moments
from dbrx_quant.calibration.statistics.moments import SELECTION_EVERY
from dbrx_quant.quantize import first_pass as measuring
from dbrx_quant.quantize.budget import measure as linears
from dbrx_quant.quantize.budget.expert import MeasuredExperts
from dbrx_quant.quantize.entries import Entry
from dbrx_quant.quantize.first_pass import MeasureJob, measure
from dbrx_quant.runtime.output.progress import Progress


class Steps(Progress):
    def __init__(self):
        self.seen = []

    def step(self, what):
        self.seen.append(what)


def job(folder, work, ids, **changes):
    return MeasureJob(StreamedModel(folder), ids, work, changes.pop("progress", Progress()), **changes)


def read(job, spec):
    """What is on disk of a linear before it is priced."""
    return Entry.read(job.entry(spec.name))


@pytest.fixture(params=["dbrx", "qwen3 moe", "llama"])
def family(request):
    return request.param


def test_slices_cover_every_row_and_token_once():
    assert [(s.start, s.stop) for s in spans(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert list(spans(0, 4)) == []
    states = torch.empty(5, 1500, 1)
    assert [(s.start, s.stop) for s in batches(states)] == [(i, i + 1) for i in range(5)]
    assert [(s.start, s.stop) for s in batches(torch.empty(5, 1000, 1))] == [(0, 2), (2, 4), (4, 5)]
    assert [(s.start, s.stop) for s in batches(torch.empty(2, 5000, 1))] == [(0, 1), (1, 2)]
    assert token_rows(torch.empty(2, 3, 7)).tolist() == [0, 0, 0, 1, 1, 1]


def assert_near(states, exact):
    """Equal but for the 16 bits of every block's states so far."""
    assert (states - exact).norm() <= 1e-3 * exact.norm()


def test_the_states_between_blocks_are_those_of_whole_blocks(family, tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "ROWS_TOKENS", 20)
    monkeypatch.setattr(walk, "EXPERT_TOKENS", 7)
    ids = random_tokens(5, 10)
    done = job(save_model(tmp_path / "model", family, std=0.2), tmp_path / "work", ids)
    measure(done)
    with torch.no_grad():
        states = done.model.embed(ids)
        for index in range(len(done.model.architecture.blocks)):
            assert_near(open_states(done.states(index))[:], states)
            states = run_block(done.model, index, states)
        assert_near(open_states(done.states(2))[:], states)
    assert not list((tmp_path / "work").glob("*scratch*"))


def test_every_linear_counts_its_tokens(family, tmp_path):
    ids = random_tokens(8, 10)
    done = job(save_model(tmp_path / "model", family, std=0.2), tmp_path / "work", ids)
    result = measure(done)
    assert result.tokens == 80
    for block in done.model.architecture.blocks:
        for stage in block.stages:
            for spec in stage:
                assert read(done, spec).linear.tokens == 80
                assert read(done, spec).linear.weight == 80
        if block.experts is None:
            assert block.index not in result.coverage
            continue
        live, states = done.model.block(block.index), open_states(done.states(block.index))
        with torch.no_grad():
            routing = route(live, states, None, torch.empty(80, states.shape[-1]))
        assert sum(row.tokens for row in result.coverage[block.index]) == routing.index.numel()
        for expert, specs in enumerate(block.experts.linears):
            mine = routing.index == expert
            for spec in specs:
                assert read(done, spec).linear.tokens == int(mine.sum())
                assert result.coverage[block.index][expert].tokens == int(mine.sum())
                squares = float(routing.weight[mine].double().square().sum())
                assert read(done, spec).linear.weight == pytest.approx(squares, rel=1e-5)


def test_options_are_priced_in_nats_and_better_than_dropping_the_linear(family, tmp_path):
    done = job(save_model(tmp_path / "model", family, std=0.2), tmp_path / "work", random_tokens(8, 10))
    linears = measure(done).linears
    assert set(linears) == {spec.name for spec in done.model.architecture.linears()}
    for spec in done.model.architecture.linears():
        entry, raw = linears[spec.name], read(done, spec)
        assert entry.shape == spec.shape
        if spec.expert is None:
            assert entry.price == pytest.approx(raw.gradient / (2 * 80))
        assert entry.options[0].error == pytest.approx(raw.linear.options[0].error * entry.price)
        assert entry.energy == pytest.approx(raw.linear.energy * entry.price)
        assert 0 < entry.options[-1].error < entry.options[0].error < entry.energy


def test_the_sizes_of_batches_do_not_matter(family, tmp_path, monkeypatch):
    folder, ids = save_model(tmp_path / "model", family, std=0.2), random_tokens(8, 12)
    results = []
    for name, rows, tokens in (("whole", 4096, 4096), ("parts", 24, 5)):
        monkeypatch.setattr(walk, "ROWS_TOKENS", rows)
        monkeypatch.setattr(walk, "EXPERT_TOKENS", tokens)
        results.append(measure(job(folder, tmp_path / name, ids)).linears)
    for name, whole in results[0].items():
        parts = results[1][name]
        assert parts.price == pytest.approx(whole.price, rel=1e-3), name
        assert parts.energy == pytest.approx(whole.energy, rel=1e-3), name
        assert parts.tokens == whole.tokens


def test_measuring_twice_gives_equal_results(tmp_path):
    folder, ids = save_model(tmp_path / "model", "dbrx", std=0.2), random_tokens(8, 12)
    first, second = (measure(job(folder, tmp_path / name, ids)) for name in ("a", "b"))
    assert first == second
    assert first != measure(job(folder, tmp_path / "c", ids, seed=1)), "labels are drawn by the seed"


def test_finished_work_is_not_done_again(family, tmp_path, monkeypatch):
    folder, ids = save_model(tmp_path / "model", family, std=0.2), random_tokens(8, 12)
    steps = [Steps(), Steps()]
    first = measure(job(folder, tmp_path / "work", ids, progress=steps[0]))

    def unwanted(*_, **__):
        raise AssertionError("done before")

    monkeypatch.setattr(StreamedModel, "block", unwanted)
    monkeypatch.setattr(linears, "draw", unwanted)
    assert measure(job(folder, tmp_path / "work", ids, progress=steps[1])) == first
    blocks = sum("block" in step and "expert" not in step for step in steps[0].seen)
    assert blocks == 4
    assert [step for step in steps[0].seen if "expert" not in step] == steps[1].seen


def test_one_missing_linear_is_measured_again_and_alike(tmp_path):
    folder, ids = save_model(tmp_path / "model", "dbrx", std=0.2), random_tokens(8, 12)
    done = job(folder, tmp_path / "work", ids)
    first = measure(done)
    names = ["model.layers.1.self_attn.k_proj", "model.layers.1.block_sparse_moe.experts.2.v1"]
    for name in names:
        done.entry(name).unlink()
    assert measure(job(folder, tmp_path / "work", ids)) == first


class Watched(Alone):
    """Keeps the tasks of measuring."""

    def __init__(self):
        self.tasks = []

    def each(self, task, turns):
        if isinstance(task, MeasuredExperts):
            self.tasks.append(task)
        return super().each(task, turns)


def test_experts_alike_share_one_choice_of_shrinkage(tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "MIN_SELECTION_TOKENS", 8)
    chosen = []
    choose = linears.choose_shrinkage
    monkeypatch.setattr(linears, "choose_shrinkage", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    folder = save_model(tmp_path / "model", "dbrx", std=0.2)
    crew = Watched()
    done = job(folder, tmp_path / "work", random_tokens(4 * SELECTION_EVERY, 12), crew=crew)
    measure(done)
    found = {}
    for task in crew.tasks:
        for (expert, tokens), specs in zip(task.effective.items(), task.experts.linears, strict=True):
            for spec in specs:
                assert spec.expert == expert
                alike = task.block, spec.role == "down", linears.step(tokens, spec.shape[0])
                found.setdefault(alike, set()).add(read(done, spec).linear.shrinkage)
    assert len(crew.tasks) == len(done.model.architecture.blocks)
    assert all(len(values) == 1 for values in found.values()), found
    assert len(chosen) < sum(len(b.experts.linears) * 2 + 2 for b in done.model.architecture.blocks)


@pytest.mark.parametrize("family", EXPERTS)
def test_an_expert_seen_rarely_leans_on_the_price_of_all(family, tmp_path):
    """Per unit of squared routing weight, the price of each lies between its own and the block's."""
    done = job(save_model(tmp_path / "model", family, std=0.2), tmp_path / "work", random_tokens(8, 12))
    result = measure(done).linears
    experts = done.model.architecture.blocks[0].experts
    for specs in zip(*experts.linears, strict=True):
        raw = [read(done, spec) for spec in specs]
        usual = sum(entry.gradient for entry in raw) / sum(entry.linear.weight for entry in raw)
        for spec, entry in zip(specs, raw, strict=True):
            if entry.linear.weight > 1:
                unit = result[spec.name].price * 2 * 96 / entry.linear.weight
                low, high = sorted((usual, entry.gradient / entry.linear.weight))
                assert low * 0.999 <= unit <= high * 1.001


def test_states_that_overflow_are_refused_with_the_block(tmp_path):
    def damage(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3] = 3e38

    folder = save_model(tmp_path / "model", "llama", change=damage)
    with pytest.raises(ValueError, match=r"output of block 1: NaN or infinity in row 0"):
        measure(job(folder, tmp_path / "work", random_tokens(4, 6)))


def test_gradients_that_overflow_are_refused_with_block_and_row(tmp_path):
    ids = random_tokens(4, 6)
    ids[2, 3] = 299  # a token that no other row has

    def damage(tensors):
        tensors["model.embed_tokens.weight"][299] = 3e38  # squares are beyond float32, RMS norm hides it

    assert (ids == 299).sum() == 1
    folder = save_model(tmp_path / "model", "llama", change=damage)
    with pytest.raises(ValueError, match=r"gradients before block 1: NaN or infinity in row 2"):
        measure(job(folder, tmp_path / "work", ids))


@pytest.mark.parametrize("family", ["dbrx", "llama"])
def test_gradients_of_a_part_of_the_rows_stand_for_those_of_all(family, tmp_path, monkeypatch):
    folder, ids = save_model(tmp_path / "model", family, std=0.2), random_tokens(48, 12)
    every = job(folder, tmp_path / "all", ids)
    assert torch.equal(every.rows, ids)
    assert every.backward_rows == 48
    whole = measure(every).linears
    monkeypatch.setattr(measuring, "GRADIENT_TOKENS", 64)
    part = job(folder, tmp_path / "part", ids)
    assert part.backward_rows == 24
    assert torch.equal(part.rows[:24], ids[::2])
    assert sorted(part.rows.tolist()) == sorted(ids.tolist())
    found = measure(part).linears
    assert len(open_states(part.gradients(0))) == 24
    for spec in part.model.architecture.linears():
        mine, exact = found[spec.name], whole[spec.name]
        assert mine.tokens == exact.tokens
        assert mine.weight == pytest.approx(exact.weight, rel=1e-4)
        assert mine.price == pytest.approx(exact.price, rel=0.5)
