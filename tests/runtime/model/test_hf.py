"""EXL2 folders load through transformers' own classes and do there what other models do."""

import json
import subprocess
import sys

import pytest
import torch
from quant_models import CONFIGS, build_quantized_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dbrx_quant.runtime import load_model
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.model.quantizer import Exl2Config, Exl2HfQuantizer

PROMPT = torch.arange(20)[None] * 7 % 128
FAMILIES = ("dbrx", "llama tied and biased", "mixtral", "qwen2", "qwen2 moe", "qwen3 moe")


def logits(model, ids=PROMPT):
    with torch.no_grad():
        return model(ids).logits


def generate(model, **options):
    return model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)[
        0
    ].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return build_quantized_folder(CONFIGS[request.param](), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder.path)


@pytest.fixture
def dbrx(tmp_path):
    return build_quantized_folder(CONFIGS["dbrx"](), tmp_path / "dbrx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_and_load_model_give_equal_logits(folder, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype)
    assert torch.equal(logits(loaded), logits(load_model(folder.path, dtype=dtype)))


def test_generation_without_a_cache_is_that_of_the_dense_twin(folder, model):
    assert generate(model, use_cache=False) == generate(folder.twin(), use_cache=False)


def test_generation_is_the_same_with_every_cache_and_with_assistance(model):
    expected = generate(model)
    assert generate(model, cache_implementation="static") == expected
    assert generate(model, prompt_lookup_num_tokens=3) == expected
    assert generate(model, assistant_model=model) == expected


def test_a_batch_with_padding_generates_what_its_rows_generate_alone(model):
    rows = [PROMPT[0], PROMPT[0, 5:]]
    alone = [model.generate(row[None], max_new_tokens=6, min_new_tokens=6, do_sample=False) for row in rows]
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -len(row) :], mask[index, -len(row) :] = row, 1
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for index, row in enumerate(alone):
        assert torch.equal(together[index, -6:], row[0, -6:])


@pytest.mark.parametrize("name", ["dbrx", "qwen2"])
def test_the_forward_compiles_as_one_graph(name, tmp_path):
    model = load_model(build_quantized_folder(CONFIGS[name](), tmp_path).path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(PROMPT).logits, logits(model), rtol=1e-4, atol=1e-4)


def test_a_saved_model_has_the_same_tensors_and_loads_again(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == folder.tensors.keys()
    for name, tensor in folder.tensors.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name], tensor), name
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "again", dtype=torch.float32)), logits(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (
        config["quantization_config"]
        == json.loads((folder.path / "config.json").read_text())["quantization_config"]
    )


def test_shards_are_loaded_by_their_index(dbrx):
    expected = logits(load_model(dbrx.path))
    AutoModelForCausalLM.from_pretrained(dbrx.path).save_pretrained(
        dbrx.path.parent / "s", max_shard_size="50KB"
    )
    assert len(list((dbrx.path.parent / "s").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(dbrx.path.parent / "s", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)


def test_an_index_that_leaves_out_a_shard_is_refused(dbrx):
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in dbrx.tensors.items():
        part = parts["b.safetensors" if "layers.1.block_sparse_moe.experts.3" in name else "a.safetensors"]
        part[name] = tensor
    (dbrx.path / "model.safetensors").unlink()
    for file, tensors in parts.items():
        save_file(tensors, dbrx.path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(parts["a.safetensors"], "a.safetensors")}
    (dbrx.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"experts.3.* is in b.safetensors, .*`dbrx-quant index"):
        AutoModelForCausalLM.from_pretrained(dbrx.path)
    load_model(dbrx.path)


def test_tensors_that_transformers_did_not_load_are_an_error(dbrx, monkeypatch):
    monkeypatch.setattr(
        Exl2HfQuantizer, "update_weight_conversions", lambda self, conversions, model=None: []
    )
    with pytest.raises(CheckpointError, match=r"transformers did not load .* random weights"):
        AutoModelForCausalLM.from_pretrained(dbrx.path)


def test_a_rope_base_that_the_caller_sets_is_kept(dbrx):
    config = AutoConfig.from_pretrained(dbrx.path)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1234.0}
    loaded = AutoModelForCausalLM.from_pretrained(dbrx.path, config=config)
    assert loaded.config.rope_parameters["rope_theta"] == 1234.0


def test_a_model_without_head_is_refused(dbrx):
    with pytest.raises(ValueError, match="load EXL2 models with AutoModelForCausalLM"):
        AutoModel.from_pretrained(dbrx.path)


def test_dense_weights_are_not_quantized_on_the_fly(dbrx, tmp_path):
    dbrx.twin().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=Exl2Config())


def test_gradients_are_refused_in_words(dbrx):
    model = load_model(dbrx.path)
    embedded = model.get_input_embeddings()(PROMPT).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=PROMPT).loss
    with pytest.raises(RuntimeError, match="no gradient"):
        loss.backward()


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_runtime_is_all_that_from_pretrained_needs(dbrx):
    load = f"AutoModelForCausalLM.from_pretrained({str(dbrx.path)!r})"
    code = f"import dbrx_quant.runtime; from transformers import AutoModelForCausalLM; print({load})"
    assert "(lm_head): QuantLinear" in run(code)


@pytest.mark.parametrize("first", ["transformers.quantizers.auto", "dbrx_quant.runtime.model.quantizer"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"import {first}, dbrx_quant.runtime; from transformers.quantizers import auto"
    assert run(f"{code}; print('exl2' in auto.AUTO_QUANTIZER_MAPPING)") == "True\n"


def test_importing_the_runtime_imports_neither_torch_nor_transformers():
    code = "import dbrx_quant.runtime, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()\n"
