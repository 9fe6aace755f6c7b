"""The command: what it prints where, its exit codes, and that every verb does what it says."""

import argparse
import json
import os
from pathlib import Path

import pytest
from cli_runs import run, spawn
from measurements import linear, measurement
from safetensors import safe_open
from small_configs import CONFIGS
from tiny_output import make_output, make_source

from dbrx_quant.calibration.blocks.routing import ExpertCoverage
from dbrx_quant.quantize import conversion as converting
from dbrx_quant.quantize.measurement import write_measurement
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.folder.inspect import inspect_folder
from dbrx_quant.runtime.library import _cuda, _gpus
from dbrx_quant.scripts.cli.main import main
from dbrx_quant.scripts.terminal.arguments import bpw_list, size
from dbrx_quant.scripts.terminal.output import bytes_text, seconds_text

TEXT = "The quick brown fox jumps over 13 lazy dogs, and 27 more. " * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small source, a randomly quantized output of it, and a text."""
    folder = tmp_path_factory.mktemp("cli")
    make_output(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40GB", 40 * 10**9),
        ("22GiB", 22 * 2**30),
        ("22.5 gb", 22_500_000_000),
        ("1TB", 10**12),
        ("512MiB", 2**29),
        ("8G", 8 * 10**9),
        ("2000000000", 2 * 10**9),
        ("2000000000B", 2 * 10**9),
    ],
)
def test_sizes_are_read(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "40", "-3GB", "4oGB", "0GB", "40 GB of it", "3iB", "1e9", "nan"])
def test_what_is_no_size_is_refused_with_the_way_out(text):
    with pytest.raises(argparse.ArgumentTypeError, match="GB"):
        size(text)


def test_lists_of_targets_keep_their_order():
    assert bpw_list("3.0") == (3.0,)
    assert bpw_list("4.25,2.25, 3") == (4.25, 2.25, 3.0)


@pytest.mark.parametrize("text", ["", "3.0,", "three", "1.99", "8.6", "3,3.0", "nan", "inf", "-3"])
def test_bad_targets_are_usage_errors(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "model", "out", f"--bpw={text}"])
    assert stop.value.code == 2
    assert "argument --bpw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "m", "o"],
        ["convert", "m", "o", "--bpw", "3", "--size", "40GB"],
        ["convert", "m", "o", "--bpw", "3", "--head-bits", "7"],
        ["convert", "m", "o", "--bpw", "3", "--rows", "0"],
        ["convert", "m", "o", "--bpw", "3", "--resume", "perhaps"],
        ["convert", "m", "o", "--size", "40"],
        ["measure", "m"],
        ["generate", "d", "prompt", "--temperature", "-1"],
        ["eval", "d", "--text"],
        ["inspect"],
    ],
)
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "usage: dbrx-quant" in captured.err
    assert captured.out == ""


def test_figures_for_people_have_units():
    assert bytes_text(131_900_000_000) == "131.9 GB"
    assert bytes_text(7_815_000) == "7.82 MB"
    assert bytes_text(12) == "12 B"
    assert [seconds_text(s) for s in (4.21, 89.96, 720, 12_000)] == [
        "4.2 s",
        "90.0 s",
        "12 min",
        "3 h 20 min",
    ]


# --- inspect


def test_inspect_counts_the_bits_that_are_stored(folders, capsys):
    code, out, _ = run(capsys, "inspect", folders / "out", "--json")
    result = json.loads(out)
    stored, total = {}, 0
    with safe_open(folders / "out" / "model.safetensors", "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            tensor = opened.get_tensor(name)
            linear = name.rsplit(".", 1)[0]
            total += tensor.numel() * tensor.element_size()
            stored[linear] = stored.get(linear, 0) + 8 * tensor.numel() * tensor.element_size()
    specs = {spec.name: spec for spec in describe(load_config(folders / "source")).linears()}
    weights = {name: spec.shape[0] * spec.shape[1] for name, spec in specs.items()}
    decoder = [name for name in specs if name != "lm_head"]
    assert code == 0
    assert result["linears"].keys() == specs.keys()
    for name, entry in result["linears"].items():
        assert entry["bpw"] == stored[name] / weights[name]
        assert entry["shape"] == list(specs[name].shape)
    assert result["bpw"] == sum(stored[n] for n in decoder) / sum(weights[n] for n in decoder)
    assert result["head_bpw"] == stored["lm_head"] / weights["lm_head"]
    assert result["total_bytes"] == total
    expert = result["linears"]["model.layers.1.block_sparse_moe.experts.0.w2"]
    assert expert["groups"] == [[4, 32], [3, 32], [3, 32]]
    assert expert["widths"] == {"4": 32, "3": 64}
    assert (expert["block"], expert["expert"], expert["role"]) == (1, 0, "down")


def test_inspect_splits_the_bits_by_block_role_and_expert(folders):
    facts = inspect_folder(folders / "out")
    for block, bpw in facts.blocks.items():
        members = [linear for linear in facts.linears if linear.block == block]
        assert bpw == sum(m.bits for m in members) / sum(m.weights for m in members)
        gates = [linear for linear in members if linear.role == "gate"]
        assert facts.block_roles[block, "gate"] == sum(m.bits for m in gates) / sum(m.weights for m in gates)
    assert facts.experts.keys() == {(block, expert) for block in range(2) for expert in range(2)}
    assert facts.role_widths["down"] == {4: pytest.approx(1 / 3), 3: pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_knows_every_family(name, tmp_path):
    from quant_models import build_quantized_folder

    folder = build_quantized_folder(CONFIGS[name](), tmp_path / "model", head=False).path
    facts = inspect_folder(folder)
    assert facts.head_bpw == 16  # left in 16 bits, or the embedding's
    assert 2 < facts.bpw < 12
    json.dumps(facts.to_json(), allow_nan=False)


def test_inspect_shows_a_row_for_each_block(folders, capsys):
    code, out, _ = run(capsys, "inspect", folders / "out")
    assert code == 0
    assert f"{inspect_folder(folders / 'out').bpw:.4f} bits per weight" in out
    for word in ("gate", "down", "4 bits", "3 bits", "(expert 0)", "spread"):
        assert word in out


# --- verify


def test_verify_says_that_a_sound_folder_is_sound(folders, capsys):
    code, out, err = run(capsys, "verify", folders / "out", "--quiet")
    assert (code, err) == (0, "")
    assert "sound: 21 quantized linears" in out
    code, out, _ = run(capsys, "verify", folders / "out", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["ok"] is True


def test_verify_prints_a_line_for_each_fault_and_exits_with_3(folders, tmp_path, capsys):
    broken = make_output(tmp_path)
    shard = broken / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (broken / "tokenizer.json").unlink()
    code, out, _ = run(capsys, "verify", broken, "--quiet")
    assert code == 3
    assert any("SHA-256" in line for line in out.splitlines())
    assert any("tokenizer.json" in line for line in out.splitlines())
    code, out, _ = run(capsys, "verify", broken, "--json", "--quiet", "--no-checksums")
    result = json.loads(out)
    assert code == 3
    assert result["ok"] is False
    assert not any("SHA-256" in fault for fault in result["faults"])


# --- eval


def evaluated(capsys, folders, *arguments):
    options = ("--text", folders / "text.txt", "--windows", 3, "--length", 32, "--json", "--quiet")
    code, out, _ = run(capsys, "eval", folders / "out", *options, *arguments)
    assert code == 0
    return json.loads(out)


def test_eval_compares_with_the_original(folders, capsys):
    result = evaluated(capsys, folders, "--reference", folders / "source")
    assert {"ppl", "reference_ppl", "kl", "top1", "router_topk", "bpw", "seconds"} <= result.keys()
    assert result["kl"] > 0
    assert result["bpw"] == inspect_folder(folders / "out").bpw
    assert result["router_topk"] == pytest.approx(sum(result["router_topk_blocks"]) / 2)
    assert result["positions"] == 96


def test_eval_from_a_cache_gives_the_same_scores(folders, tmp_path, capsys):
    direct = evaluated(capsys, folders, "--reference", folders / "source")
    filled = evaluated(capsys, folders, "--reference", folders / "source", "--cache", tmp_path / "cache")
    cached = evaluated(capsys, folders, "--cache", tmp_path / "cache")
    for key in ("ppl", "reference_ppl", "kl", "top1", "router_topk"):
        assert filled[key] == cached[key] == pytest.approx(direct[key], rel=1e-5)


def test_eval_without_an_original_is_bad_usage(folders, capsys):
    code, out, err = run(capsys, "eval", folders / "out", "--text", folders / "text.txt")
    assert (code, out) == (2, "")
    assert "--reference" in err


def test_eval_shows_a_table(folders, capsys):
    code, out, _ = run(
        capsys,
        *("eval", folders / "out", "--reference", folders / "source", "--text", folders / "text.txt"),
        *("--windows", "2", "--length", "16", "--quiet"),
    )
    assert code == 0
    assert "perplexity" in out
    assert "KL divergence" in out


# --- generate


def test_generate_streams_the_text_that_json_reports(folders, capsys):
    command = ("generate", folders / "out", "The fox", "--max-new-tokens", "5")
    code, out, _ = run(capsys, *command, "--json")
    result = json.loads(out)
    assert code == 0
    assert 1 <= result["new_tokens"] <= 5
    assert result["prompt_tokens"] == 7  # bytes
    code, streamed, _ = run(capsys, *command)
    assert code == 0
    assert streamed.rstrip("\n") == result["text"].rstrip("\n")


def test_generate_samples_by_the_seed(folders, capsys):
    def text(seed):
        command = ("generate", folders / "out", "The fox", "--temperature", "2", "--seed", seed, "--json")
        return json.loads(run(capsys, *command, "--max-new-tokens", "12")[1])["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_generate_applies_the_chat_template(folders, capsys):
    code, out, _ = run(capsys, "generate", folders / "out", "Hi", "--chat", "--max-new-tokens", "1", "--json")
    assert code == 0
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    assert json.loads(out)["prompt_tokens"] == 1 + 5 + 2 + 1 + 1 + 1 + 10


@pytest.mark.parametrize("prompt", ["", "-"])
def test_generate_refuses_an_empty_prompt(prompt, folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115 - pytest's own closes
    code, out, err = run(capsys, "generate", folders / "out", prompt)
    assert (code, out) == (1, "")
    assert "the prompt is empty" in err


# --- doctor


def test_doctor_tells_versions_and_kernels(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["native"]["usable"]
    assert found["native"]["isa"] in ("scalar", "avx2", "avx512")
    assert found["packages"]["torch"]
    assert found["memory"]["total"] > 0
    assert found["threads"]["torch"] >= 1
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert found["packages"]["transformers"] in out


def test_doctor_fails_where_the_kernels_cannot_run():
    process = spawn("doctor", "--json", env={**os.environ, "DBRXQ_ISA": "mmx"})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "mmx" in json.loads(out)["native"]["reason"]


def test_doctor_says_of_each_gpu_whether_the_kernels_run_on_it(capsys, monkeypatch):
    gpus = [_gpus.Gpu(0, "H100", 90, 80 * 10**9), _gpus.Gpu(1, "P100", 60, 16 * 10**9)]
    monkeypatch.setattr(_gpus, "find_gpus", lambda: gpus)
    monkeypatch.setattr(_gpus, "driver_version", lambda: 12080)
    monkeypatch.setattr(_cuda, "build", lambda: _gpus.Build(12080, (80, 90), (90,)))
    monkeypatch.setattr(_cuda, "_probe", lambda gpu: None)
    monkeypatch.setattr(_cuda.LIBRARY, "why_unavailable", lambda: None)
    _cuda._why_not_on.cache_clear()
    try:
        code, out, _ = run(capsys, "doctor")
        found = json.loads(run(capsys, "doctor", "--json")[1])["cuda"]
    finally:
        _cuda._why_not_on.cache_clear()
    assert code == 0
    assert "H100, 80.00 GB, compute capability 9.0: the CUDA kernels run on it" in " ".join(out.split())
    assert [gpu["reason"] is None for gpu in found["gpus"]] == [True, False]
    assert "need 7.5 (Turing) or newer" in found["gpus"][1]["reason"]
    assert found["driver"] == "for CUDA 12.8"
    assert found["targets"] == "8.0, 9.0, PTX of 9.0 (CUDA 12.8)"


# --- convert and measure


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """The options that `convert` was called with; nothing is converted."""
    calls = []

    def fake(options):
        calls.append(options)
        experts = tuple(ExpertCoverage(count, 0.25, 0.5) for count in (40, 0, 70, 3))
        measured = measurement(
            {"lm_head": linear((32, 32), [(3000, 0.1, "3:32")])}, coverage=dict.fromkeys((0, 10, 9), experts)
        )
        for target in options.targets:
            options.output(target).mkdir(parents=True)
            write_measurement(options.output(target) / "measurement.json", measured)
        return [
            converting.Converted(options.output(t), t, t - 0.001, 0.01, None, 10**6, 2.5, 10**9)
            for t in options.targets
        ]

    monkeypatch.setattr(converting, "convert", fake)
    return calls


def test_convert_passes_every_option_on(seen, folders, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        *("convert", folders / "source", tmp_path / "o", "--bpw", "2.5,3.0", "--head-bits", "8"),
        *("--calibration", "offline", "--rows", "4", "--length", "32", "--seed", "7"),
        *("--measurement", tmp_path / "m.json", "--work-dir", tmp_path / "w", "--resume", "must"),
        *("--max-memory", "3GiB", "--max-shard-size", "2GB", "--quiet", "--json"),
    )
    assert code == 0
    assert seen == [
        converting.ConvertOptions(
            model=folders / "source",
            out=tmp_path / "o",
            targets=(2.5, 3.0),
            head_bits=8,
            calibration="offline",
            rows=4,
            length=32,
            seed=7,
            measurement=tmp_path / "m.json",
            work_dir=tmp_path / "w",
            resume="must",
            max_memory=3 * 2**30,
            max_shard_bytes=2 * 10**9,
            quiet=True,
        )
    ]
    results = json.loads(out)["results"]
    assert [Path(result["folder"]).name for result in results] == ["2.5bpw", "3.0bpw"]
    assert results[0]["bpw"] == 2.499


def test_convert_shows_a_table(seen, folders, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", folders / "source", tmp_path / "o", "--bpw", "2.5,3.0", "--quiet")
    assert code == 0
    coverage = [line.split() for line in out.splitlines() if "(expert 1)" in line]
    assert [line[0] for line in coverage] == ["0", "9", "10"]
    assert coverage[0] == ["0", "0", "(expert", "1)", "40", "70", "(expert", "2)", "1"]
    for text in ("2.4990", "0.01000", "1.00 MB", "peak memory: 1.00 GB", str(tmp_path / "o" / "3.0bpw")):
        assert text in out


@pytest.mark.parametrize("goal", [["--size", "1.1MB"], ["--vram", "1.2MB", "--context", "64"]])
def test_convert_aims_at_a_size(goal, seen, folders, tmp_path, capsys):
    command = ("convert", tmp_path, folders / "source")
    code, _, err = run(capsys, command[0], command[2], command[1] / "o", *goal)
    assert code == 0
    (options,) = seen
    assert len(options.targets) == 1
    assert f"target: {options.targets[0]} bits per weight" in err


def test_convert_dry_run_prints_the_plan_and_writes_nothing(folders, tmp_path, capsys):
    command = ("convert", folders / "source", tmp_path / "o", "--bpw", "2,3.5", "--dry-run")
    options = ("--calibration", "offline", "--rows", "4", "--length", "32")
    code, out, _ = run(capsys, *command, *options, "--json")
    planned = json.loads(out)
    assert code == 0
    assert [target["reachable"] for target in planned["targets"]] == [False, True]
    code, out, _ = run(capsys, *command, *options)
    assert code == 0
    assert f"{planned['lowest_bpw']:.3f} to {planned['highest_bpw']:.3f}" in out
    assert list(tmp_path.iterdir()) == []


def test_convert_measures_quantizes_and_verifies(folders, tmp_path, capsys):
    source = make_source(tmp_path / "source")
    options = ("--calibration", folders / "text.txt", "--rows", "4", "--length", "32", "--quiet", "--json")
    code, out, _ = run(capsys, "measure", source, "-o", tmp_path / "m.json", *options)
    assert code == 0
    assert json.loads(out)["measurement"] == str(tmp_path / "m.json")
    code, out, _ = run(
        capsys,
        *("convert", source, tmp_path / "out", "--bpw", "4.5", "--measurement", tmp_path / "m.json"),
        *options,
    )
    (result,) = json.loads(out)["results"]
    assert code == 0
    assert inspect_folder(tmp_path / "out").bpw == pytest.approx(result["bpw"])
    assert result["bpw"] <= 4.5
    assert run(capsys, "verify", tmp_path / "out", "--quiet")[0] == 0
