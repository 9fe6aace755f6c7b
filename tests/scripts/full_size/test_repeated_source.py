import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_random_tokens

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.exl2.checkpoint import TensorInfo
from dbrx_quant.runtime.families import source
from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.scripts.full_size.make_synthetic import make
from dbrx_quant.scripts.full_size.repeated_source import main, repeated, repeated_sources
from dbrx_quant.scripts.full_size.weights import Sizes

SMALL = Sizes(hidden=64, ffn=96, experts=4, active=2, heads=4, kv_heads=2, vocabulary=704)
BLOCKS, STORED = 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "small"
    make(folder, SMALL, BLOCKS, repeat=STORED, shard_bytes=200_000, quiet=True)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_random_tokens(
        tmp_path_factory.mktemp("tokens") / "tokens.safetensors", 16, 32, vocabulary=704
    )


def command(folder, out, tokens, *more):
    return ["convert", *map(str, (folder, out)), "--bpw", "4", "--calibration", str(tokens), "--quiet", *more]


@pytest.fixture(scope="module")
def converted(folder, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    assert main(command(folder, out, tokens)) == 0
    return out


def test_block_i_is_the_stored_block_i_mod_m(folder):
    with repeated_sources():
        opened = open_source(folder)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    checkpoint = opened.checkpoint
    assert len(opened.architecture.blocks) == BLOCKS
    assert len(checkpoint.names()) == 3 + 8 * BLOCKS
    key = "model.layers.{}.block_sparse_moe.experts.w2"
    for index in range(BLOCKS):
        own = stored[f"transformer.blocks.{index % STORED}.ffn.experts.mlp.w2"]
        assert torch.equal(checkpoint.load(key.format(index)), own)
    assert not torch.equal(checkpoint.load(key.format(0)), checkpoint.load(key.format(1)))
    assert {path.name for path in checkpoint.files()} == {path.name for path in folder.glob("*.safetensors")}


def test_only_the_repeated_reader_takes_such_a_source(folder):
    before = source.open_weights
    with pytest.raises(CheckpointError, match=f"describes {BLOCKS} layers, the weights have {STORED}"):
        open_source(folder)
    with repeated_sources():
        open_source(folder)
        assert source.open_weights is not before
    assert source.open_weights is before


def test_blocks_that_the_configuration_does_not_have_are_left_out(tmp_path):
    make(tmp_path / "small", SMALL, 2, quiet=True)
    make(tmp_path / "one", SMALL, 1, quiet=True)
    (tmp_path / "small" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    with repeated_sources():
        opened = open_source(tmp_path / "small").checkpoint
    plain = open_source(tmp_path / "one").checkpoint
    assert opened.names() == plain.names()
    assert all(torch.equal(opened.load(name), plain.load(name)) for name in plain.names())


def test_a_gap_between_stored_blocks_is_refused(tmp_path):
    info = TensorInfo("x", "BF16", (1,), tmp_path, 0, 2)
    for names in ([], ["model.layers.1.x"], ["model.layers.0.x", "model.layers.2.x"]):
        with pytest.raises(CheckpointError, match="without a gap"):
            repeated(dict.fromkeys(names, info), 4)


def test_the_converted_model_has_all_blocks_verifies_and_runs(converted):
    report = verify(converted)
    assert report.ok, report.faults
    model = load_model(converted, dtype=torch.float32)
    assert len(model.transformer.blocks) == BLOCKS
    logits = model(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_changed_shard_is_noticed_under_any_of_its_names(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with repeated_sources():
        checkpoint = open_source(copy).checkpoint
    name = f"model.layers.{BLOCKS - 1}.block_sparse_moe.experts.w1"
    path = checkpoint.info(name).file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has been written to or replaced"):
        checkpoint.load(name)


@pytest.mark.parametrize("stage", [pytest.param("measure/linears", marks=pytest.mark.slow), "4*/linears"])
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(folder, tokens, converted, tmp_path, stage):
    out, work = tmp_path / "out", tmp_path / "work"
    line = [sys.executable, "-m", "dbrx_quant.scripts.full_size.repeated_source"]
    line += command(folder, out, tokens, "--work-dir", str(work))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, env=environment, text=True)
    while len(list(work.glob(f"{stage}/*"))) < 20 and process.poll() is None:
        time.sleep(0.004)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(line, capture_output=True, env=environment, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for file in converted.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
