"""One block at a time gives what transformers' whole model gives."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, alter, random_tokens, run_block, save_model, whole_model

from dbrx_quant.calibration.blocks.model import StreamedModel
from dbrx_quant.runtime.files.errors import CheckpointError


def whole_states(folder, ids):
    """Inputs of every block, the last block's output, and logits, of transformers' own forward."""
    model, states = whole_model(folder), []
    layers = model.transformer.blocks if model.config.model_type == "dbrx" else model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True)

    def see_last(_module, _args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    layers[-1].register_forward_hook(see_last)
    with torch.no_grad():
        logits = model(ids).logits
    return states, logits


def streamed_states(folder, ids):
    model = StreamedModel(folder)
    with torch.no_grad():
        states = [model.embed(ids)]
        for index in range(len(model.architecture.blocks)):
            states.append(run_block(model, index, states[-1]))
        logits = model.final_norm(states[-1]) @ model.dense(model.architecture.head).T
    return states, logits


@pytest.fixture(scope="module", params=CONFIGS)
def family_folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), request.param)


def test_streamed_blocks_give_the_states_and_logits_of_the_whole_model(family_folder):
    ids = random_tokens(3, 20)
    theirs, their_logits = whole_states(family_folder, ids)
    ours, our_logits = streamed_states(family_folder, ids)
    assert len(ours) == len(theirs) == 3
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda m, i=index: f"{i}: {m}")
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)


def test_rows_of_another_length_run_after_each_other(family_folder):
    model = StreamedModel(family_folder)
    ids = random_tokens(2, 24)
    with torch.no_grad():
        long = run_block(model, 0, model.embed(ids))
        short = run_block(model, 0, model.embed(ids[:1, :9]))
    torch.testing.assert_close(long[:1, :9], short, rtol=1e-4, atol=1e-5)  # attention looks back only


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2 moe"])
def test_the_stream_is_told_before_and_after_what_every_token_passes(family, tmp_path):
    """As transformers' own block has it, whose routed experts are put to 0."""
    folder, ids = save_model(tmp_path, family), random_tokens(2, 12)
    model, live, between = whole_model(folder), StreamedModel(folder).block(1), []
    layer = model.model.layers[1]
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
    if hasattr(layer.mlp, "experts"):
        layer.mlp.experts.down_proj.data.zero_()
    before, after = [], []
    layer.register_forward_pre_hook(lambda _, args, kwargs: before.append(args[0]), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output: after.append(output))
    with torch.no_grad():
        model(ids)
        output, middle = live.with_middle(before[0])
        torch.testing.assert_close(output, after[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(middle, between[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(output, live(before[0])[0])
        torch.testing.assert_close(live.without_mlp(before[0]), between[0], rtol=1e-4, atol=1e-5)
    assert (output is middle) == (family == "mixtral")
    assert torch.equal(output, live(before[0])[0]), "everything is in its place again"


def test_clip_qkv_is_honoured_and_matters(tmp_path):
    folder = save_model(tmp_path, "dbrx", std=0.2)
    config = json.loads((folder / "config.json").read_text())
    outputs = {}
    for clip in (0.3, 8):
        config["attn_config"]["clip_qkv"] = clip
        (folder / "config.json").write_text(json.dumps(config))
        ids = random_tokens(2, 16)
        _, theirs = whole_states(folder, ids)
        _, outputs[clip] = streamed_states(folder, ids)
        torch.testing.assert_close(outputs[clip], theirs, rtol=1e-4, atol=1e-4)
    assert (outputs[0.3] - outputs[8]).abs().max() > 0.1


def test_the_rope_base_of_the_nested_config_is_used(tmp_path):
    folder = save_model(tmp_path, "dbrx", std=0.3)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    results = []
    for base in (500000.0, 10.0):
        config["attn_config"]["rope_theta"] = base
        (folder / "config.json").write_text(json.dumps(config))
        results.append(streamed_states(folder, random_tokens(1, 24))[1])
        torch.testing.assert_close(
            results[-1], whole_states(folder, random_tokens(1, 24))[1], rtol=1e-4, atol=1e-4
        )
    assert (results[0] - results[1]).abs().max() > 0.01


def test_installed_weights_are_used(tmp_path):
    model = StreamedModel(save_model(tmp_path, "dbrx"))
    live, spec = model.block(0), model.architecture.blocks[0].stages[0][1]
    assert spec.role == "k"
    live.install({spec.name: torch.zeros(spec.shape[1], spec.shape[0])})
    begin, end = spec.outputs
    weight = live.submodule(spec).weight
    assert (weight[begin:end] == 0).all()
    assert (weight[:begin] != 0).any(1).all()
    assert (weight[end:] != 0).any(1).all()
    assert (model.block(0).submodule(spec).weight[begin:end] != 0).any(), (
        "a new block has the source's weights"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "linear"),
    [
        ("transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight", r"model\.layers\.1\.self_attn\.q_proj"),
        ("transformer.blocks.1.norm_attn_norm.attn.out_proj.weight", r"model\.layers\.1\.self_attn\.o_proj"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, tensor, linear, value):
    folder = save_model(tmp_path, "dbrx", change=lambda t: t[tensor][3].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{linear}: the weight contains NaN or infinity"):
        StreamedModel(folder).block(1)


def test_an_expert_weight_that_is_not_finite_is_named(tmp_path):
    def damage(tensors):
        tensors["transformer.blocks.0.ffn.experts.mlp.v1"][96 * 2 + 5, 7] = float("nan")

    model = StreamedModel(save_model(tmp_path, "dbrx", change=damage))
    gate, up, _ = model.architecture.blocks[0].experts.linears[2]
    model.dense(gate)
    with pytest.raises(CheckpointError, match=r"experts\.2\.v1: the weight contains NaN"):
        model.dense(up)


def test_a_missing_tensor_is_named_when_the_model_is_opened(tmp_path):
    folder = save_model(tmp_path, "mixtral")
    name = next(n for n in load_file(folder / "model.safetensors") if n.endswith("experts.3.w2.weight"))
    alter(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(
        CheckpointError, match=r"no weight for model\.layers\.\d\.block_sparse_moe\.experts\.3\.w2"
    ):
        StreamedModel(folder)


def test_a_missing_norm_is_named_when_the_model_is_opened(tmp_path):
    folder = save_model(tmp_path, "llama", change=lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight"):
        StreamedModel(folder)


def test_a_shard_cut_short_is_named(tmp_path):
    folder = save_model(tmp_path, "llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        StreamedModel(folder)


def test_a_folder_without_shards_is_refused(tmp_path):
    folder = save_model(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"safetensors"):
        StreamedModel(folder)


def test_weights_in_16_bits_run_in_float32(tmp_path):
    folder = save_model(tmp_path, "llama")
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ids = random_tokens(1, 12)
    ours, our_logits = streamed_states(folder, ids)
    assert ours[-1].dtype == torch.float32
    torch.testing.assert_close(our_logits, whole_states(folder, ids)[1], rtol=1e-4, atol=1e-4)
