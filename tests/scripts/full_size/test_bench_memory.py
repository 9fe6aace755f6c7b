"""Random folders of DBRX's shapes, and the bench of models that do not fit into memory."""

import json
import shutil

import pytest
import torch

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.scripts.full_size import bench_memory, make_quantized

pytestmark = pytest.mark.slow  # a gigabyte of weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("random") / "dbrx"
    assert make_quantized.main([str(out), "--blocks", "1", "--vocabulary", "512"]) == 0
    yield out
    shutil.rmtree(out)


def test_the_folder_is_what_its_configuration_says(folder):
    report = verify(folder)
    assert report.facts["linears"] == 4 + 3 * 16 + 1
    assert not [fault for fault in report.faults if "token" not in fault], "it has no tokenizer"


def test_a_prompt_for_all_experts_has_the_same_bits_out_of_memory_and_from_the_file(folder, capsys):
    """More than is read ahead at once: experts are computed some at a time."""
    prompt = torch.arange(64)[None]
    with use_activations("int8"):
        expected = load_model(folder)(prompt).logits
        figures = bench_memory.main([str(folder), "--memory", "300MB", "--tokens", "8", "--json"])
        assert figures == 0
        said = json.loads(capsys.readouterr().out)
        assert said["tokens_per_s"] > 0
        assert said["own_bytes"] < said["weights_bytes"]
        assert (folder / REPACKED_NAME).exists()
        assert torch.equal(load_model(folder)(prompt).logits, expected)
        kept = load_model(folder, memory=300_000_000, notify=lambda line: None)
        assert torch.equal(kept(prompt).logits, expected)
