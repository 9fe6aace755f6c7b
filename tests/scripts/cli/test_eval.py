"""`eval` on a text: the original streams, what that takes is said and checked first, a kill loses little."""

import json
import signal

import pytest
from cli_runs import run, spawn
from small_models import save_model
from tiny_output import make_output

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.quantize.estimate import evaluation as estimate
from dbrx_quant.runtime.evaluation.scores import evaluate, windows
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.model.load_dense import load_dense

TEXT = "The quick brown fox jumps over 13 lazy dogs, and 27 more. " * 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small source, a randomly quantized output of it, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    make_output(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def arguments(folders, *more, source="source"):
    options = ("--text", folders / "text.txt", "--windows", 3, "--length", 32)
    return ("eval", folders / "out", "--reference", folders / source, *options, *more)


def test_the_scores_are_those_of_both_models_loaded_whole(folders, capsys):
    code, out, err = run(capsys, *arguments(folders, "--json", "--quiet"))
    assert (code, err) == (0, "")
    ours, rows = json.loads(out), windows(folders / "out", folders / "text.txt", 3, 32)
    theirs = evaluate(load_model(folders / "out"), load_dense(folders / "source"), rows)
    for name in ("ppl", "reference_ppl", "kl", "top1"):
        assert ours[name] == pytest.approx(getattr(theirs, name), rel=1e-3), name
    assert ours["router_topk_blocks"] == pytest.approx(list(theirs.router_topk))


def test_memory_and_disk_are_said_first(folders, tmp_path, capsys):
    _, _, err = run(capsys, *arguments(folders))
    line = next(line for line in err.splitlines() if line.startswith("the original goes"))
    assert "3 windows a block at a time" in line
    assert f"{2 * 4 * 96 * 64 / 1e3:.2f} kB of disk" in line  # states and experts' inputs
    _, _, err = run(capsys, *arguments(folders, "--cache", tmp_path))
    assert f"{4 * 96 * 300 / 1e3:.1f} kB for log-probabilities of disk in {tmp_path}" in err
    _, _, err = run(capsys, *arguments(folders, "--cache", tmp_path))
    assert "the original goes" not in err, "all of it is there"


def test_what_the_machine_has_no_room_for_is_refused_before_the_work(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StreamedModel, "block", None)
    monkeypatch.setattr(estimate, "available_memory", lambda: 10**8)
    code, _, err = run(capsys, *arguments(folders, "--quiet"))
    assert code == 1
    assert "about 0.9 GB of memory are needed beside the mapped weights, 0.1 GB are available" in err
    monkeypatch.undo()
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    code, _, err = run(capsys, *arguments(folders, "--quiet", "--cache", tmp_path))
    assert code == 1
    assert f"{tmp_path}: about 0.0 GB of disk are needed for the original's states and" in err


def test_an_original_of_another_model_is_refused_before_the_work(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StreamedModel, "block", None)
    save_model(folders / "other", "mixtral")
    code, _, err = run(capsys, *arguments(folders, source="other"))
    assert code == 1
    assert "family dbrx, the original's mixtral: not the same model" in err


def test_a_cache_of_another_original_is_refused(folders, tmp_path, capsys):
    assert run(capsys, *arguments(folders, "--cache", tmp_path, "--quiet"))[0] == 0
    (folders / "source" / "config.json").write_bytes(
        (folders / "source" / "config.json").read_bytes() + b"\n"
    )
    code, _, err = run(capsys, *arguments(folders, "--cache", tmp_path, "--quiet"))
    assert code == 1
    assert "window-00000.safetensors: made from another original; use another folder" in err


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["ctrl-c", "kill"]
)
def test_a_stopped_run_goes_on_from_its_cache_and_leaves_no_files_of_its_own(stop, folders, tmp_path, capsys):
    process = spawn(*arguments(folders, "--cache", tmp_path, "--json"))
    for line in process.stderr:
        if line.startswith("the original goes"):
            break
    process.send_signal(stop)
    process.communicate(timeout=120)
    assert process.returncode in {signal.SIGINT: (0, 130), signal.SIGKILL: (0, -9)}[stop]
    code, out, _ = run(capsys, *arguments(folders, "--cache", tmp_path, "--json", "--quiet"))
    _, whole, _ = run(capsys, *arguments(folders, "--json", "--quiet"))
    assert code == 0
    assert json.loads(out)["kl"] == pytest.approx(json.loads(whole)["kl"], rel=1e-5)
    left = {path.name.lstrip(".").partition(".")[0] for path in tmp_path.iterdir()}
    assert left == {"window-00000", "window-00001", "window-00002"}
