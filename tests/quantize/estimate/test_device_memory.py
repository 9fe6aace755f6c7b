"""A conversion takes as much memory of a device as is said before it starts."""

import pytest
from far_device import FAR, far_device
from small_models import save_model, save_random_tokens

from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.conversion import convert, measure_model
from dbrx_quant.quantize.estimate import memory
from dbrx_quant.quantize.options import ConvertOptions


def options(model, out, tokens, **changes):
    return ConvertOptions(model, out, (3.0,), calibration=str(tokens), quiet=True, **changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, tokens, and room."""
    folder = tmp_path_factory.mktemp("device")
    tokens = save_random_tokens(folder / "tokens.safetensors", 24, 16)
    return save_model(folder / "model", "dbrx", std=0.2), tokens, folder


def test_a_device_with_too_little_memory_is_refused_at_the_start(small, tmp_path, monkeypatch):
    model, tokens, _ = small
    monkeypatch.setattr(memory, "free_bytes", lambda device: 306_000_000 if device == FAR else None)
    for verb in (convert, lambda chosen: measure_model(chosen, tmp_path / "measured")):
        with far_device(), pytest.raises(ValueError, match=r"device lazy: about 0\.31 GB of its memory"):
            verb(options(model, tmp_path / "out", tokens, device="lazy"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400_000_000)
    with far_device():
        convert(options(model, tmp_path / "out", tokens, device="lazy"))


@pytest.mark.slow
@pytest.mark.parametrize(("length", "refit"), [(32, False), (128, True)])
def test_the_memory_of_the_device_is_what_the_estimate_says(tmp_path, monkeypatch, length, refit, one_thread):
    """DBRX's own shapes, and all that is there at a time, divided by 16."""
    places = ("calibration.blocks.walk", "calibration.blocks.head", "calibration.blocks.routing")
    places += ("quantize.first_pass", "quantize.estimate.memory", "calibration.statistics.held_out")
    for place in places:
        for name, most in (("ROWS_TOKENS", 128), ("EXPERT_TOKENS", 128), ("TOKENS_AT_ONCE", 32)):
            monkeypatch.setattr(f"dbrx_quant.{place}.{name}", most, raising=False)
        for name in ("HELD_OUT_TOKENS", "PRIOR_TOKENS"):
            monkeypatch.setattr(f"dbrx_quant.{place}.{name}", 128, raising=False)

    def shape(config):
        config.d_model, config.n_heads, config.n_layers, config.vocab_size = 384, 24, 1, 6272
        config.attn_config.kv_n_heads, config.max_seq_len = 4, 256
        config.ffn_config.hidden_size, config.ffn_config.ffn_hidden_size = 384, 672

    model = save_model(tmp_path / "model", "dbrx", std=0.02, configure=shape)
    tokens = save_random_tokens(tmp_path / "tokens.safetensors", 1024 // length, length)
    expected = []

    def note(device, architecture, needs):
        expected.append(memory.device_bytes(architecture, needs) - memory.DEVICE_BASE_BYTES)

    monkeypatch.setattr(conversion, "check_device_memory", note)
    with far_device() as far:
        convert(options(model, tmp_path / "out", tokens, device="lazy", refit=refit))
    assert far.now == 0
    assert far.peak <= expected[0] <= 2 * far.peak
