"""Values that cannot be quantized or stored are found before the work."""

import pytest
import torch
from small_models import save_model

from dbrx_quant.runtime.families.source import open_source
from dbrx_quant.runtime.families.values import check_values
from dbrx_quant.runtime.files.errors import CheckpointError

BLOCK = "model.layers.1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.embed_tokens.weight", float("nan"), "nan does not fit in float16"),
        ("model.norm.weight", float("inf"), "inf does not fit in float16"),
        (f"{BLOCK}.input_layernorm.weight", 1e5, "100000 does not fit in float16"),
        (f"{BLOCK}.self_attn.q_proj.bias", -1e5, "100000 does not fit in float16"),
        (f"{BLOCK}.mlp.down_proj.weight", float("nan"), r"element \[3, 0\] is nan"),
        (f"{BLOCK}.self_attn.o_proj.weight", float("-inf"), r"element \[3, 0\] is -inf"),
    ],
)
def test_a_value_that_cannot_be_kept_is_refused_naming_its_tensor(tmp_path, name, value, message):
    def change(tensors):
        tensors[name].view(len(tensors[name]), -1)[3, 0] = value

    source = open_source(save_model(tmp_path, "llama tied and biased", change=change))
    with pytest.raises(CheckpointError, match=f"{name.replace('.', '[.]')}.*{message}"):
        check_values(source.architecture, source.checkpoint, quiet=True)


def test_sound_values_pass(tmp_path):
    source = open_source(save_model(tmp_path, "dbrx"))
    check_values(source.architecture, source.checkpoint, quiet=True)
    assert torch.isfinite(source.checkpoint.load("lm_head.weight")).all()
