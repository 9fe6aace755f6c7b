"""How many tokens a conversion is calibrated on where nobody says: by the size of the model alone."""

import dataclasses
import math

import pytest
from places import TINY

from dbrx_quant.quantize import rows
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.quantize.rows import default_shape, load_rows
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config

TINY_WEIGHTS = 11_862_016


def enlarged(architecture, times):
    """The same with a head so large that it has so many times the weights."""
    k, n = architecture.head.shape
    others = TINY_WEIGHTS - k * n
    head = dataclasses.replace(architecture.head, shape=(k, (times * TINY_WEIGHTS - others) // k))
    return dataclasses.replace(architecture, head=head)


@pytest.fixture(scope="module")
def tiny():
    return describe(load_config(TINY))


@pytest.mark.parametrize(
    ("weights", "length"), [(7.9e9, 2048), (8.1e9, 1024), (31e9, 1024), (33e9, 512), (132e9, 512)]
)
def test_large_models_have_shorter_rows(tiny, weights, length):
    assert default_shape(enlarged(tiny, int(weights / TINY_WEIGHTS))) == (128, length)


def test_shorter_rows_are_told_of_and_a_given_length_is_kept(tiny, tmp_path, capsys, monkeypatch):
    def loaded(name, **given):
        options = ConvertOptions(TINY, tmp_path / name, calibration="offline", rows=2, **given)
        options.work.mkdir()
        return load_rows(options, tiny).tokens

    assert loaded("plain").input_ids.shape == (2, 512), "the limit of the model"
    assert not capsys.readouterr().err
    monkeypatch.setattr(rows, "LENGTHS", ((math.inf, 128),))  # as if the model were large
    assert loaded("given", length=200).input_ids.shape == (2, 200)
    assert not capsys.readouterr().err
    large = loaded("large")
    assert large.input_ids.shape == (2, 128)
    assert large.description["length"] == 128
    assert "2 rows of 128 tokens, as suits a large model; --rows and --length" in capsys.readouterr().err
