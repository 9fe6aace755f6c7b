"""Models whose linears come out of the repacked file: the same answers, with one copy of the weights."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from transformers import AutoModelForCausalLM

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.folder.repacked_file import REPACKED_NAME, open_repacked, write_repacked
from dbrx_quant.runtime.kernels.activations import use_activations
from dbrx_quant.runtime.kernels.repacked import repacked_linear
from dbrx_quant.runtime.model import memory as memory_module
from dbrx_quant.runtime.step.native_step import use_native_step

TOKENS = torch.arange(1, 9)[None]


@pytest.fixture(autouse=True)
def rounded():
    with use_activations("int8"):
        yield


@pytest.fixture
def folder(tmp_path):
    return build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "m").path


def contents_of(folder):
    architecture = describe(load_config(folder))
    return read_contents(architecture, architecture.open(folder))


def answer(model):
    """Logits of a prompt and of each of some tokens after it."""
    out = model.generate(
        TOKENS,
        attention_mask=torch.ones_like(TOKENS),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def is_mapped(linear):
    repacked = repacked_linear(linear.stored(), linear.bias, linear.out_features)
    return getattr(repacked.blocks[0].body, "mapped", None)


def damage(folder, name):
    """Change one bit of a linear's body."""
    file = open_repacked(contents_of(folder))
    place = next(place for place in file.places if place.spec.name == name)
    with file.path.open("r+b") as stream:
        stream.seek(place.start + 100)
        byte = stream.read(1)[0]
        stream.seek(place.start + 100)
        stream.write(bytes([byte ^ 2]))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_answers_bit_by_bit_as_without_the_file(family, tmp_path):
    folder = build_quantized_folder(CONFIGS[family](), tmp_path / "m").path
    for mode in ("int8", "int16"):
        with use_activations(mode):
            (folder / REPACKED_NAME).unlink(missing_ok=True)
            expected = answer(load_model(folder))
            write_repacked(contents_of(folder))
            assert torch.equal(answer(load_model(folder)), expected)
            said = []
            assert torch.equal(answer(load_model(folder, memory=10**6, notify=said.append)), expected)
            assert len(said) == 1


@pytest.mark.parametrize("native", [False, True])
def test_part_of_a_model_in_memory_gives_the_same_bits(folder, native, isa):
    with use_native_step(native):
        expected = answer(load_model(folder))
        for share in (0.2, 0.6, 0.9):
            said = []
            model = load_model(folder, memory=least(folder, share), notify=said.append)
            assert torch.equal(answer(model), expected)
            assert "stay in memory" in said[-1]
            assert "tokens a second" in said[-1]


def least(folder, share):
    """Bytes for what has to stay in memory and a share of the linears."""
    contents = contents_of(folder)
    places = memory_module.plan_repacked(contents)
    floats = [n for n in contents.names if n.rpartition(".")[0] not in contents.groups]
    fixed = sum(2 * contents.checkpoint.info(n).nbytes for n in floats) + sum(p.head_bytes for p in places)
    return fixed + int(share * sum(place.body_bytes for place in places))


def test_what_every_token_reads_stays_in_memory_first(folder):
    experts = sum(
        p.body_bytes for p in memory_module.plan_repacked(contents_of(folder)) if p.spec.expert is not None
    )
    everything = least(folder, 1.0)
    model = load_model(folder, memory=everything - experts, notify=lambda line: None)
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "q_weight")}
    assert {name for name, m in linears.items() if is_mapped(m)} == {n for n in linears if "experts" in n}


def test_the_busiest_experts_stay_by_the_measurement_beside_the_shards(folder):
    shares = [0.4, 0.1, 0.3, 0.2]
    listed = [{"tokens": 1, "share": share, "mean_weight": 0.5} for share in shares]
    (folder / "measurement.json").write_text(json.dumps({"coverage": {"0": listed, "1": listed[::-1]}}))
    places = memory_module.plan_repacked(contents_of(folder))
    of_experts = [p for p in places if p.spec.expert is not None]
    busy = {(0, 0), (0, 2), (1, 3), (1, 1)}
    room = sum(p.body_bytes for p in of_experts if (p.spec.block, p.spec.expert) in busy)
    limit = least(folder, 1.0) - sum(p.body_bytes for p in of_experts) + room
    said = []
    memory = memory_module.prepare_memory(contents_of(folder), limit, 4, said.append)
    kept = {(p.spec.block, p.spec.expert) for p in of_experts if p.spec.name in memory.plan.names}
    assert kept == busy
    quiet = 2 * sum(
        shares[e] * p.body_bytes
        for p in of_experts
        for e in [p.spec.expert]
        if p.spec.block == 0 and e in (1, 3)
    )
    quiet += 2 * sum(
        shares[3 - e] * p.body_bytes
        for p in of_experts
        for e in [p.spec.expert]
        if p.spec.block == 1 and e in (0, 2)
    )
    assert memory.plan.from_disk == pytest.approx(quiet), "two of four experts are active"


def test_memory_that_is_too_little_is_refused_with_what_is_needed(folder):
    with pytest.raises(
        ValueError, match=r"memory: 0.0 MB are too little: embedding, norms, .* take 0\.\d MB"
    ):
        load_model(folder, memory=1000)


def test_memory_is_refused_where_it_has_no_meaning(folder):
    with use_activations("float"), pytest.raises(ValueError, match="memory: activations are 'float'"):
        load_model(folder, memory=10**6)
    with pytest.raises(ValueError, match=r"memory: .* on the CPU only"):
        load_model(folder, device="meta", memory=10**6)


def test_a_model_that_stays_in_memory_wholly_needs_no_file(folder):
    said = []
    load_model(folder, memory=10**7, notify=said.append)
    assert not (folder / REPACKED_NAME).exists()
    assert said == [f"all {said[0].split()[1]} MB of weights stay in memory"]


def test_the_file_is_made_where_it_is_needed_and_used_from_then_on(folder):
    said = []
    load_model(folder, memory=least(folder, 0.5), notify=said.append)
    assert f"{REPACKED_NAME}: writing" in said[0]
    before = (folder / REPACKED_NAME).stat().st_mtime_ns
    load_model(folder, memory=least(folder, 0.5), notify=said.append)
    assert (folder / REPACKED_NAME).stat().st_mtime_ns == before
    assert len(said) == 3


def test_a_file_that_cannot_be_made_is_an_error_that_tells_the_way_out(folder, monkeypatch):
    def refuse(contents):
        raise PermissionError(13, "Permission denied", str(folder / REPACKED_NAME))

    monkeypatch.setattr(memory_module, "write_repacked", refuse)
    with pytest.raises(OSError, match="Permission denied; with memory for all of the weights"):
        load_model(folder, memory=least(folder, 0.5), notify=lambda line: None)


def test_a_file_of_other_shards_is_not_used_and_the_log_says_so(tmp_path, caplog):
    made = build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "m")
    write_repacked(contents_of(made.path))
    for name in made.tensors:
        if name.endswith(".q_weight"):
            made.tensors[name] = ~made.tensors[name]
    made.write()
    found = answer(load_model(made.path))
    assert "made of other shards than those beside it" in caplog.text
    (made.path / REPACKED_NAME).unlink()
    assert torch.equal(found, answer(load_model(made.path)))
    write_repacked(contents_of(build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "other", seed=5).path))
    (tmp_path / "other" / REPACKED_NAME).rename(made.path / REPACKED_NAME)
    said = []
    model = load_model(made.path, memory=least(made.path, 0.5), notify=said.append)
    assert "made of other shards" in said[0]
    assert "writing" in said[1]
    assert torch.equal(answer(model), found)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("memory", [None, 0.9])
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj", "model.layers.1.block_sparse_moe.experts.2.w2", "lm_head"]
)
def test_a_damaged_body_ends_the_answer_with_an_error_that_names_it(folder, name, memory, native):
    write_repacked(contents_of(folder))
    expected = answer(load_model(folder))
    damage(folder, name)
    limit = {} if memory is None else {"memory": least(folder, memory), "notify": lambda line: None}
    model = load_model(folder, **limit)

    def use():
        for _ in range(3):  # an expert is looked at when it is chosen
            assert torch.equal(answer(model), expected)
        model(torch.arange(64)[None] % 128)

    with use_native_step(native), pytest.raises(CheckpointError, match=f"{REPACKED_NAME}: {name}: differs"):
        use()
    with use_activations("float"):
        answer(load_model(folder))  # the shards are read, which are sound


def test_transformers_own_door_uses_the_file(folder):
    write_repacked(contents_of(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(answer(model), answer(load_model(folder)))
    assert all(is_mapped(m) for m in model.modules() if hasattr(m, "q_weight"))


def test_a_copy_of_a_model_and_a_changed_one_do_without_the_file(folder):
    write_repacked(contents_of(folder))
    model = load_model(folder)
    copied = copy.deepcopy(model)
    assert torch.equal(answer(copied), answer(model))
    linear = next(m for m in copied.modules() if hasattr(m, "q_weight"))
    assert is_mapped(linear) is None
    before = answer(model)
    first = next(m for m in model.modules() if hasattr(m, "q_weight"))
    first.q_weight.bitwise_not_()
    assert not torch.equal(answer(model), before)


def test_what_is_saved_comes_from_the_shards(folder, tmp_path):
    write_repacked(contents_of(folder))
    model = load_model(folder, memory=least(folder, 0.5), notify=lambda line: None)
    expected = answer(model)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / REPACKED_NAME).exists()
    assert torch.equal(answer(load_model(tmp_path / "saved")), expected)
    model.save_pretrained(folder)
    assert torch.equal(answer(load_model(folder)), expected), "whether the file is taken for theirs or not"


READS = """
import hashlib, sys, torch
from pathlib import Path
from dbrx_quant.runtime import load_model
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
model = load_model(sys.argv[1])
before = own()
logits = model(torch.arange(64)[None]).logits
step = model.generate(torch.arange(1, 9)[None], max_new_tokens=3, do_sample=False)
print(own() - before, hashlib.sha256(logits.numpy().tobytes()).hexdigest(), step.tolist())
"""


def start(folder):
    environment = {**os.environ, "DBRXQ_ACTIVATIONS": "int8", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", READS, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_the_weights_are_in_memory_once_and_two_processes_share_them(tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 2
    folder = build_quantized_folder(config, tmp_path / "m").path
    weights = sum(place.body_bytes for place in memory_module.plan_repacked(contents_of(folder)))
    assert weights > 15e6
    without, answer_without = start(folder).communicate()[0].split(maxsplit=1)
    write_repacked(contents_of(folder))
    both = [start(folder), start(folder)]
    outputs = [process.communicate()[0].split(maxsplit=1) for process in both]
    assert {said for _, said in outputs} == {answer_without}
    for own, _ in outputs:
        assert int(own) < int(without) - 0.75 * weights
