import json

import pytest
import torch

from dbrx_quant.calibration.blocks import walk
from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.scripts.full_size import bench_convert
from dbrx_quant.scripts.full_size.convert_steps import STEPS, solving
from dbrx_quant.scripts.full_size.make_synthetic import make
from dbrx_quant.scripts.full_size.repeated_source import repeated_sources
from dbrx_quant.scripts.full_size.step_clock import REST, Clock
from dbrx_quant.scripts.full_size.weights import Sizes

SMALL = Sizes(hidden=64, ffn=96, experts=8, active=4, heads=4, kv_heads=2, vocabulary=704)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "small"
    make(folder, SMALL, 3, repeat=1, quiet=True)
    return folder


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    """Of a run with half of the experts."""
    history = tmp_path_factory.mktemp("history")
    arguments = [str(folder), "--rows", "32", "--length", "32", "--trial", "0.01", "--record", str(history)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_convert, "PRODUCT", (64, 64, 64))
        patch.setattr(bench_convert, "COPIED", 1 << 16)
        assert bench_convert.main([*arguments, "--experts-measured", "4", "--json"]) == 0
    (path,) = history.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["bench"] == "convert"
    return found["figures"]


def steps(report, phase):
    return {step["step"]: step for step in report["phases"][phase]["steps"]}


def test_every_step_runs(report):
    ran = {name for phase in report["phases"] for name in steps(report, phase)}
    assert {step.name for step in STEPS} <= {name.rpartition(": ")[2] for name in ran}


def test_the_steps_of_a_pass_and_the_rest_are_all_of_it(report):
    assert report["phases"].keys() == {"measuring", "quantizing"}
    for found in report["phases"].values():
        assert sum(step["seconds"] for step in found["steps"]) == pytest.approx(found["seconds"])
        assert sum(step["share"] for step in found["steps"]) == pytest.approx(1)
        assert found["steps"][-1]["step"] == REST
        assert found["spent_seconds"] < found["seconds"]  # of which experts' are counted twice


def test_calls_are_counted_for_all_experts_and_shared_trials_once(report):
    measuring, quantizing = steps(report, "measuring"), steps(report, "quantizing")
    linears = 4 + 3 * SMALL.experts
    assert quantizing["packing"]["calls"] == linears
    assert quantizing["code search"]["calls"] == linears  # few rows: one block each
    assert measuring["curves"]["calls"] == linears
    assert measuring["factorisation"]["calls"] == 2 + 2 * SMALL.experts  # by inputs
    roles, widths = 4, 4  # the first linear of q k v, o, gate up and down
    assert measuring["feedback trials: code search"]["calls"] == roles * widths
    assert quantizing["repair"]["calls"] == 1 + SMALL.experts
    assert report["experts"] == SMALL.experts
    assert len(report["experts_measured"]) == 4


def test_the_experts_measured_are_the_most_usual_ones_and_put_back(folder):
    with repeated_sources():
        model = StreamedModel(folder)
    before, states = model.architecture, model.embed(torch.arange(512).view(16, 32))
    with torch.no_grad():
        chosen = bench_convert.average_experts(model, states, 3)
        every = bench_convert.average_experts(model, states, 8)
    assert every == list(range(8))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 3
    with bench_convert.some_experts(model, chosen, Clock()):
        block = model.architecture.blocks[0]
        assert [linears[0].expert for linears in block.experts.linears] == chosen
        assert [turn.expert for turn in walk.turns(None, block.experts)] == chosen
    assert model.architecture is before
    assert [turn.expert for turn in walk.turns(None, before.blocks[0].experts)] == list(range(8))


def test_the_tables_show_every_step(report, capsys):
    bench_convert.show(report)
    shown = capsys.readouterr().out
    for phase in report["phases"]:
        assert all(name in shown for name in steps(report, phase))
    assert "1024 tokens" in shown
    assert "3 such blocks" in shown


def test_more_effort_means_more_operations():
    call = {"weight": torch.empty(64, 10), "rows": [32, 32]}
    fast, default, best = (solving({**call, "effort": effort}) for effort in range(3))
    assert 0 < fast < default < best
    assert solving({"weight": torch.empty(64, 20), "rows": [32, 32], "effort": 1}) == 2 * default
