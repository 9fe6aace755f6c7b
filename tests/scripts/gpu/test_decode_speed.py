"""The decode bench of a GPU, on the CPU and on the emulator: repeated layers, and the ways to decode."""

import pytest
import torch
from emulated import play_gpu
from quant_models import CONFIGS, build_quantized_folder

from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.step.native_step import use_native_step
from dbrx_quant.scripts.gpu import decode_speed

IDS = torch.tensor([[5, 9, 2, 17, 4]])


@pytest.fixture
def model(tmp_path):
    config = CONFIGS["dbrx"]()
    config.num_hidden_layers = 1
    folder = build_quantized_folder(config, tmp_path / "model", head=True).path
    return lambda: load_model(folder, dtype=torch.float32)


@torch.no_grad()
def test_repeated_layers_share_their_weights_and_compute_one_after_another(model):
    one, three = model(), decode_speed.repeated(model(), 3)
    layers = three.base_model.blocks if hasattr(three.base_model, "blocks") else three.base_model.layers
    assert len(layers) == 3
    assert len({tensor.data_ptr() for tensor in layers.parameters()}) == len(list(layers[0].parameters()))
    with use_native_step(False):
        kept = one.base_model
        inner = kept.blocks if hasattr(kept, "blocks") else kept.layers
        states, outputs = [], []
        hook = inner[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
        one(IDS, use_cache=False)
        hook.remove()
        handles = [layer.register_forward_pre_hook(lambda m, a: states.append(a[0])) for layer in layers]
        three(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
    first = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(states[1], first)
    assert not torch.equal(states[2], states[1])


def test_native_steps_of_repeated_layers_say_what_transformers_does(model):
    rows = decode_speed.speeds(decode_speed.repeated(model(), 3), sequences=(1, 2), new=6)
    assert [(row.way, row.sequences) for row in rows] == [
        (way, count) for count in (1, 2) for way in ("transformers", "native step")
    ]
    assert all(row.equal == 1 and row.tokens_a_second > 0 for row in rows)
    assert [row.bytes_a_second is None for row in rows] == [False, False, True, True]


@pytest.mark.usefixtures("emulated")
def test_on_a_gpu_steps_run_ahead_as_well(model, monkeypatch):
    play_gpu(monkeypatch)
    rows = decode_speed.speeds(decode_speed.repeated(model(), 2), sequences=(1,), new=4)
    assert [row.way for row in rows] == ["transformers", "native step", "run ahead"]
    assert all(row.equal == 1 for row in rows)


def test_a_token_reads_the_active_experts_alone(model):
    loaded = model()
    stored = {name: tensor.nbytes for name, tensor in loaded.named_buffers() if "q_" in name}
    packed = {n: size for n, size in stored.items() if n.endswith(("q_weight", "q_scale", "q_scale_max"))}
    experts = sum(size for name, size in packed.items() if ".experts." in name)
    ffn = loaded.config.ffn_config
    expected = sum(packed.values()) - experts * (1 - ffn.moe_top_k / ffn.moe_num_experts)
    assert decode_speed.active_bytes(loaded) == pytest.approx(expected, rel=0.01)
