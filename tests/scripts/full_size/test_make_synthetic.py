import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.calibration.blocks.routing import coverage
from dbrx_quant.calibration.blocks.walk import run_dense_block
from dbrx_quant.runtime.exl2.weight_files import INDEX_NAME
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.families.facts import check_dense_source
from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.tokenizer.check import check_tokenizer
from dbrx_quant.scripts.dev.dbrx_sizes import dbrx
from dbrx_quant.scripts.full_size.make_synthetic import SHARD_BYTES, config, main, make, shards, stored_bytes
from dbrx_quant.scripts.full_size.weights import Sizes, Weights

SMALL = Sizes(hidden=64, ffn=96, experts=4, active=2, heads=4, kv_heads=2, vocabulary=704)
FLAGS = [f"--{field.name.replace('_', '-')}={getattr(SMALL, field.name)}" for field in fields(SMALL)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "small"
    make(folder, SMALL, 2, shard_bytes=200_000, quiet=True)
    return folder


def test_the_source_is_read_as_a_dbrx_of_the_sizes_asked_for(small):
    source = open_source(small)
    assert source.notes == ()
    blocks = source.architecture.blocks
    assert [block.experts.count for block in blocks] == [4, 4]
    assert blocks[0].experts.active == 2
    assert source.architecture.hidden == 64
    assert {source.checkpoint.info(name).dtype for name in source.checkpoint.names()} == {"BF16"}
    assert not [problem for problem in check_tokenizer(small, SMALL.vocabulary) if problem.fatal]


def test_true_sizes_and_names_are_those_of_dbrx_in_as_many_shards():
    tensors = list(Weights(Sizes(), 0).tensors(40))
    runs = shards(tensors, SHARD_BYTES)
    assert len(runs) == 61  # as on the Hub
    assert max(sum(map(stored_bytes, run)) for run in runs) <= SHARD_BYTES

    class Headers:
        """What a checkpoint of these headers would say."""

        folder = "synthetic"

        def __init__(self, normalise):
            self.shapes = {normalise(tensor.name): tensor.shape for tensor in tensors}

        def __contains__(self, name):
            return name in self.shapes

        def names(self):
            return sorted(self.shapes)

        def info(self, name):
            return type("Info", (), {"shape": self.shapes[name], "dtype": "BF16", "file": "shard"})

        def is_quantized(self, name):
            return False

    check_dense_source(dbrx(), Headers(dbrx().normalise))


def test_the_default_configuration_is_that_of_dbrx(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(Sizes(), 40)), encoding="utf-8")
    assert describe(load_config(tmp_path)) == dbrx()
    assert load_config(tmp_path).rope_parameters["rope_theta"] == 500000


def test_the_same_arguments_give_the_same_bytes_with_any_number_of_threads(small, tmp_path):
    make(tmp_path / "same", SMALL, 2, shard_bytes=200_000, quiet=True)
    command = [sys.executable, "-m", "dbrx_quant.scripts.full_size.make_synthetic", tmp_path / "process"]
    command += [*FLAGS, "--blocks", "2", "--shard-size", "200kB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    assert contents(tmp_path / "same") == contents(tmp_path / "process") == contents(small)


def test_another_seed_gives_other_weights_and_a_block_does_not_depend_on_the_number_of_blocks():
    def drawn(seed, blocks):
        return {
            tensor.name: torch.cat([tensor.draw(part) for part in range(tensor.parts)])
            for tensor in Weights(SMALL, seed).tensors(blocks)
        }

    one, two, other = drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(two) == len(one) + 8
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        two["transformer.blocks.0.ffn.experts.mlp.w1"], two["transformer.blocks.1.ffn.experts.mlp.w1"]
    )


def test_every_part_of_a_tensor_is_written_where_it_belongs(small, one_thread):
    stored = {}
    for file in small.glob("*.safetensors"):
        stored |= load_file(file)
    index = json.loads((small / INDEX_NAME).read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(stored)
    for tensor in Weights(SMALL, 0).tensors(2):
        parts = [tensor.draw(part) for part in reversed(range(tensor.parts))][::-1]
        assert torch.equal(stored[tensor.name], torch.cat(parts).bfloat16()), tensor.name


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    flags = [*FLAGS, "--ffn", "4096", "--blocks", "6", "--shard-size", "3MB"]
    whole = tmp_path / "whole"
    assert main([str(whole), *flags]) == 0
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "dbrx_quant.scripts.full_size.make_synthetic", str(folder), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert made
    (folder / ".model-00009-of-00009.safetensors.0a0b0c0d.part").write_bytes(b"half")
    assert main([str(folder), *flags]) == 0
    assert contents(folder) == contents(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


def test_a_folder_with_something_else_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="holds something else"):
        make(small, SMALL, 2, seed=1, shard_bytes=200_000, quiet=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else"):
        make(tmp_path, SMALL, 2, quiet=True)


def test_weights_look_trained(tmp_path):
    """Finite through the blocks, outlier channels, falling spectra, and experts of unequal load."""
    sizes = Sizes(hidden=256, ffn=448, experts=16, active=4, heads=8, kv_heads=2, vocabulary=704)
    make(tmp_path / "model", sizes, 4, quiet=True)
    model = StreamedModel(tmp_path / "model")
    ids = torch.randint(0, 704, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.embed(ids)
        for index in range(4):
            output = torch.empty_like(states)
            routing = run_dense_block(model, index, states, output, tmp_path)
            loads = sorted(one.tokens for one in coverage(routing, 16))
            assert loads[-1] >= 4 * loads[0]
            added = (output - states).square().mean().sqrt() / states.square().mean().sqrt()
            assert 0.05 < added < 0.5
            states = output
        channels = states.square().mean((0, 1)).sqrt()
        assert channels.max() > 5 * channels.median()
        logits = model.final_norm(states) @ model.dense(model.architecture.head).T
        probabilities = logits.log_softmax(-1)
        entropy = -(probabilities.exp() * probabilities).sum(-1).mean()
        assert 0.5 < entropy < 6
        values = torch.linalg.svdvals(model.dense(model.architecture.blocks[0].experts.linears[3][1]))
        energy = values.square() / values.square().sum()
        assert 0.02 < energy[0] < 0.2
        assert energy[:25].sum() > 0.35  # a tenth of the directions; of independent numbers it is 0.22
