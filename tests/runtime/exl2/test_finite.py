"""The first value that is not finite is found, wherever it lies."""

import pytest
import torch
from safetensors.torch import save_file

from dbrx_quant.runtime.exl2 import finite
from dbrx_quant.runtime.exl2.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_it_is_told_with_its_place_whichever_chunk_it_lies_in(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(finite, "_CHUNK_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    for place in [(0, 0, 0), (1, 2, 4), (3, 6, 4)]:
        tensor = torch.randn(4, 7, 5, generator=generator).to(dtype)
        tensor[place] = float(value)
        tensor[-1, -1, -1] = float(value)
        save_file({"t": tensor}, tmp_path / "model.safetensors")
        found = finite.first_not_finite(Checkpoint(tmp_path), "t")
        assert found == f"element {list(place)} is {value}"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (40, 3)])
def test_finite_values_are_passed(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(finite, "_CHUNK_BYTES", 64)
    save_file({"t": torch.full(shape, -65504.0).half()}, tmp_path / "model.safetensors")
    assert finite.first_not_finite(Checkpoint(tmp_path), "t") is None
