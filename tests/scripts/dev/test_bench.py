"""What the benches do besides timing: random linears, comparisons, and the history of their figures."""

import argparse
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from places import DOCS
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.scripts.dev import bench_decode, bench_kernels
from dbrx_quant.scripts.dev.bench_kernels import FFN, HIDDEN, compare, mixed_groups, uniform_groups
from dbrx_quant.scripts.dev.bench_record import RECORD_VERSION, commit, cpu_model, record, slug

HISTORY = sorted((DOCS / "bench").glob("*.json"))
KEYS = {
    "format_version", "bench", "date", "commit", "machine", "versions", "settings", "figures",
}  # fmt: skip


def check_record(path):
    """The record in a file, which is complete and named for what it holds."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() == KEYS
    assert found["format_version"] == RECORD_VERSION
    assert found["machine"].keys() == {"cpu", "cores", "memory_bytes", "isa", "system", "gpus"}
    assert found["figures"]
    stem = f"{found['date'][:10]}-{found['bench']}-{slug(found['machine']['cpu'])}"
    assert re.fullmatch(rf"{re.escape(stem)}(-\d+)?", path.stem)
    return found


def test_groups_cover_every_row_in_legal_order():
    for k in (HIDDEN, FFN):
        for groups in (mixed_groups(k), uniform_groups(k, 5, 128)):
            assert sum(rows for _, rows in groups) == k
            assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)


def test_expert_linears_have_three_bits_a_weight():
    for k in (HIDDEN, FFN):
        groups = mixed_groups(k)
        code_bits = sum(bits * rows for bits, rows in groups)
        assert 2.95 < (code_bits + 4 * len(groups)) / k < 3.05


def test_the_comparison_takes_the_worst_of_threads_and_shapes():
    def rate(value, threads, **other):
        return {"k": 1, "n": 2, "threads": threads, "gweights_per_s": value} | other

    ours = [rate(90, 1, bits=4), rate(120, 2, bits=4), rate(60, 1, bits=3)]
    theirs = [rate(50, 1, type="Q4_K"), rate(100, 2, type="Q4_K"), rate(30, 1, type="Q3_K")]
    assert compare(ours, theirs) == {"4/Q4_K": 1.2, "3/Q3_K": 2.0}


def test_decoding_is_timed_in_parts_that_make_the_whole(tmp_path):
    folder = build_quantized_folder(CONFIGS["mixtral"](), tmp_path)
    model = load_model(folder.path)
    model.generation_config.eos_token_id = None
    threads, before = torch.get_num_threads(), set(vars(model.base_model.forward))
    try:
        with use_activations("int8"):
            row = bench_decode.measure(model, 1, tokens=4, runs=1)
    finally:
        torch.set_num_threads(threads)
    parts = row["ms"]
    total = parts.pop("total")
    assert parts.keys() == {"layers", "head", "python", "transformers"}
    assert min(parts.values()) > 0
    assert abs(sum(parts.values()) - total) < 1e-6
    assert set(vars(model.base_model.forward)) == before
    assert "forward" not in vars(model.lm_head)


def test_active_bytes_leave_out_the_experts_that_a_token_does_not_use(tmp_path):
    folder = build_quantized_folder(CONFIGS["mixtral"](), tmp_path)
    stored = {name: tensor.nbytes for name, tensor in folder.tensors.items() if ".q_" in name}
    experts = sum(size for name, size in stored.items() if ".experts." in name)
    expected = sum(stored.values()) - experts // 2  # 2 of 4
    assert abs(bench_decode.active_bytes(load_model(folder.path)) - expected) <= 2  # one rounding a layer


def test_decoding_is_added_to_the_history(tmp_path, capsys):
    folder = build_quantized_folder(CONFIGS["mixtral"](), tmp_path).path
    threads = torch.get_num_threads()
    try:
        with use_activations("int8"):
            command = [str(folder), "--threads", "1", "--tokens", "4", "--runs", "1"]
            assert bench_decode.main([*command, "--json", "--record", str(tmp_path / "history")]) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = (tmp_path / "history").iterdir()
    found = check_record(path)
    assert found["figures"] == json.loads(capsys.readouterr().out)
    assert found["settings"] == {
        "folder": folder.name, "threads": 1, "tokens": 4, "runs": 1, "dtype": "float32",
    }  # fmt: skip
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_a_run_without_a_history_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "measure", lambda arguments: {"gemv": [{"ms": 1.5}]})
    monkeypatch.chdir(tmp_path)
    assert bench_kernels.main(["--json"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert bench_kernels.main(["--json", "--record", "docs"]) == 0
    assert len(list(Path("docs").iterdir())) == 1


def test_a_second_run_of_a_day_does_not_replace_the_first(tmp_path):
    arguments = argparse.Namespace(
        record=tmp_path, plot=tmp_path / "a.png", text=tmp_path / "b.txt", peers={}
    )
    paths = [record("kernels", arguments, {"ms": ms}) for ms in (1.0, 2.0, 3.0)]
    assert [check_record(path)["figures"] for path in paths] == [{"ms": 1.0}, {"ms": 2.0}, {"ms": 3.0}]
    assert check_record(paths[0])["settings"] == {"text": "b.txt"}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("AMD EPYC 9B45 96-Core Processor", "amd-epyc-9b45"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("aarch64", "aarch64"),
        ("()", "unknown"),
    ],
)
def test_processors_have_short_names(name, short):
    assert slug(name) == short


def test_the_processor_is_named_where_the_system_tells(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nmodel name\t: Other\n")
    assert cpu_model(file) == "AMD EPYC (family 26, model 2)"
    assert slug(cpu_model(file)) == "amd-epyc"
    file.write_text("model name\t: Some CPU\n")
    assert cpu_model(file) == "Some CPU"
    assert cpu_model(tmp_path / "absent")


def test_the_commit_is_that_of_the_checkout_and_says_when_it_was_changed(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    file = tmp_path / "file"
    file.write_text("a")
    assert commit(file) is None
    git("add", "file")
    git("commit", "-qm", "one")
    assert commit(file) == git("rev-parse", "HEAD")
    file.write_text("b")
    assert commit(file) == git("rev-parse", "HEAD") + "+"


@pytest.mark.parametrize("path", HISTORY, ids=lambda path: path.stem)
def test_the_history_is_whole(path):
    check_record(path)
