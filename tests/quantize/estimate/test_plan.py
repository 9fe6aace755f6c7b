"""What is told before a conversion is what it takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import TINY
from small_configs import CONFIGS
from small_models import random_tokens, save_model, save_random_tokens

from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.estimate import plan as planning
from dbrx_quant.quantize.estimate.memory import (
    check_disk,
    check_memory,
    exchange_bytes,
    peak_bytes,
    quantizing_bytes,
    states_bytes,
    waiting_bytes,
)
from dbrx_quant.quantize.estimate.plan import plan
from dbrx_quant.quantize.estimate.sizes import bpw_for_size, bpw_for_vram, shape_range, total_bytes
from dbrx_quant.quantize.measurement import read_measurement
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_random_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", 8, 32, vocabulary=256)


def options(model, out, tokens, **changes):
    return ConvertOptions(**{"model": model, "out": out, "calibration": str(tokens), "quiet": True} | changes)


@pytest.fixture(scope="module")
def tiny_converted(tmp_path_factory, tokens):
    """The tiny DBRX at two targets, converted by a process of its own; its results as JSON."""
    out = tmp_path_factory.mktemp("converted") / "out"
    command = [
        "-m",
        "dbrx_quant.scripts.cli.main",
        "convert",
        str(TINY),
        str(out),
        "--bpw",
        "2.5,4.25",
        "--json",
    ]
    command += ["--calibration", str(tokens), "--quiet"]
    finished = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return json.loads(finished.stdout)["results"]


def test_the_predicted_size_is_that_of_the_shards_within_a_hundredth(tiny_converted, tokens):
    planned = plan(options(TINY, Path("unused"), tokens, targets=(2.5, 4.25)))
    assert [target.reachable for target in planned.targets] == [True, True]
    for target, result in zip(planned.targets, tiny_converted, strict=True):
        written = sum(file.stat().st_size for file in Path(result["folder"]).glob("*.safetensors"))
        assert written == result["total_bytes"]
        assert target.total_bytes == pytest.approx(written, rel=0.01)


def test_the_predicted_peak_is_not_below_what_a_conversion_used(tiny_converted, tokens):
    planned = plan(options(TINY, Path("unused"), tokens, targets=(2.5, 4.25)))
    assert planned.peak_bytes >= max(result["peak_bytes"] for result in tiny_converted)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_floor_of_the_shapes_is_the_measured_floor(family, tmp_path, tokens):
    """Also where K is not a multiple of 128 (here 64, 96 and 32) and N is padded."""
    folder = save_model(tmp_path / "model", family)
    low, high = shape_range(describe(load_config(folder)))
    file = measure_model(options(folder, tmp_path / "out", tokens), tmp_path / "measurement.json")
    measured_low, measured_high = read_measurement(file).reachable_bpw
    assert measured_low == pytest.approx(low, rel=1e-9)
    assert 0.95 * high <= measured_high <= high


def test_the_bits_for_a_size_are_the_most_that_fit(tokens):
    architecture = describe(load_config(TINY))
    for bpw in (2.5, 3.0, 4.25, 7.0):
        size = total_bytes(architecture, bpw, 6)
        found = bpw_for_size(options(TINY, Path("unused"), tokens), size)
        assert bpw - 2e-4 <= found <= bpw
        assert total_bytes(architecture, found, 6) <= size


def test_a_size_for_more_than_all_bits_gives_the_most(tokens):
    found = bpw_for_size(options(TINY, Path("unused"), tokens), 10**9)
    assert found == pytest.approx(shape_range(describe(load_config(TINY)))[1], abs=1e-4)


def test_a_size_below_the_floor_is_refused_with_what_is_needed(tokens):
    with pytest.raises(ValueError, match=r"not enough: at 2\.\d+ bits per weight, the fewest, .* GB"):
        bpw_for_size(options(TINY, Path("unused"), tokens), 10**6)


def test_more_context_leaves_fewer_bits(tokens):
    chosen = options(TINY, Path("unused"), tokens)
    short, long = (bpw_for_vram(chosen, 3_000_000, context) for context in (16, 512))
    cache = 2 * 2 * 128 * 2  # bytes a token: key and value, two blocks, 128 channels in half precision
    weights = plan(chosen).weights
    assert short - long == pytest.approx(8 * cache * (512 - 16) / weights, abs=2e-4)
    with pytest.raises(ValueError, match="with a cache of"):
        bpw_for_vram(chosen, 3_000_000, 100_000)


def test_a_limit_of_memory_below_the_need_is_refused_with_both(tmp_path, tokens):
    architecture = describe(load_config(TINY))
    ids = random_tokens(8, 32)
    need = peak_bytes(architecture, ids.numel())
    check_memory(architecture, ids.numel(), None)
    check_memory(architecture, ids.numel(), need)
    with pytest.raises(
        ValueError, match=rf"about {need / 1e9:.2f} GB .* --max-memory allows {(need - 1) / 1e9:.2f} GB"
    ):
        check_memory(architecture, ids.numel(), need - 1)
    with pytest.raises(ValueError, match=r"--max-memory allows 0\.10 GB"):
        convert(options(TINY, tmp_path / "out", tokens, targets=(3.0,), max_memory=10**8))
    assert not (tmp_path / "out").exists()


def disk(monkeypatch, folder, free):
    """A disk with that many bytes free."""
    usage = shutil.disk_usage(folder)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("limit", [50_000, 8_000_000_000])
def test_a_disk_without_room_is_refused_before_the_work_starts(limit, tmp_path, tokens, monkeypatch):
    architecture, ids = describe(load_config(TINY)), random_tokens(8, 32)
    count, result = ids.numel(), 2_000_000
    results = (result, result // 2)
    measuring, quantizing = states_bytes(architecture, count), quantizing_bytes(architecture, count)
    waiting = waiting_bytes(architecture, result, limit)
    assert waiting == result if limit > result else limit < waiting < result / 2

    def check(free, work=tmp_path / "work", out=tmp_path / "out", results=results, measured=False):
        disk(monkeypatch, tmp_path, free)
        check_disk(architecture, count, work, out, results, limit, measured)

    work = max(measuring, quantizing + waiting)
    enough = max(work, quantizing + waiting + sum(results))
    check(enough)
    with pytest.raises(ValueError, match="out: the results take"):
        check(enough - 1)
    with pytest.raises(ValueError, match=r"work: about \d+\.\d\d GB of disk .* --work-dir"):
        check(work - 1)
    with pytest.raises(ValueError, match="work: about"):
        check(measuring - 1, out=None, results=())
    check(measuring, out=None, results=())
    check(quantizing + waiting + sum(results), measured=True)
    with pytest.raises(ValueError, match="out: the results take"):
        check(quantizing + waiting + sum(results) - 1, measured=True)
    for folder in ("work", "out"):  # what is there already is no need any more
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "there.safetensors").write_bytes(bytes(1000))
    check(enough - 2000)
    with pytest.raises(ValueError, match="of disk are needed"):
        check(10)
    disk(monkeypatch, tmp_path, more := work - 1000 + exchange_bytes(architecture, count))
    check_disk(architecture, count, tmp_path / "work", None, results, limit, several=True)
    disk(monkeypatch, tmp_path, more - 1)
    with pytest.raises(ValueError, match="of disk are needed"):
        check_disk(architecture, count, tmp_path / "work", None, results, limit, several=True)
    disk(monkeypatch, tmp_path, 10)
    with pytest.raises(ValueError, match="of disk are needed"):  # the disk is still that full
        convert(options(TINY, tmp_path / "new", tokens, targets=(3.0,)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", [100_000, 250_000, 8_000_000_000])
def test_what_is_on_disk_stays_below_what_was_estimated(limit, tmp_path, tokens, monkeypatch):
    """Linears and shards together, at every moment that a file has been written or is about to be renamed."""
    out, peak, original = tmp_path / "out", [0], os.replace

    def replace(source, target):
        linears = (tmp_path / "out.work").glob("*/linears/*.safetensors")
        held = sum(path.stat().st_size for path in [*linears, *out.glob("*.safetensors")])
        peak[0] = max(peak[0], held + Path(source).stat().st_size * (Path(target).suffix == ".safetensors"))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (result,) = convert(options(TINY, out, tokens, targets=(3.0,), max_shard_bytes=limit))
    waiting = waiting_bytes(describe(load_config(TINY)), result.total_bytes, limit)
    headers = 0.01 * result.total_bytes  # those of the linears' files are not counted
    assert 0.5 * min(limit, result.total_bytes) < peak[0] - result.total_bytes < waiting + headers


def test_more_tokens_need_more_memory():
    architecture = describe(load_config(TINY))
    assert peak_bytes(architecture, 2 * 10**6) > peak_bytes(architecture, 10**6)


def test_a_plan_knows_its_tokens_and_is_plain_json(tokens):
    few = plan(options(TINY, Path("unused"), tokens, targets=(3.0, 9.0)))
    many = plan(options(TINY, Path("unused"), "offline", rows=64, length=512))
    assert few.measure_seconds < many.measure_seconds
    assert few.disk_bytes < many.disk_bytes
    assert [target.reachable for target in few.targets] == [True, False]
    assert json.loads(json.dumps(few.to_json()))["family"] == "dbrx"


def test_a_plan_counts_the_repair_where_there_is_one(tokens, monkeypatch):
    monkeypatch.setattr(planning, "machine_speed", lambda: 1e9)
    fast, default, best = (
        plan(options(TINY, Path("unused"), tokens, effort=effort)) for effort in ("fast", "default", "best")
    )
    assert fast.measure_seconds < default.measure_seconds
    assert 1.2 * fast.quantize_seconds < default.quantize_seconds < best.quantize_seconds


def test_a_plan_of_an_unknown_model_is_refused(tmp_path, tokens):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        plan(options(tmp_path, Path("unused"), tokens))
