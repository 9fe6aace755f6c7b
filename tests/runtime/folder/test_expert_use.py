"""How often experts are chosen, from the measurement beside the shards."""

import json

import pytest
from small_configs import CONFIGS

from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.expert_use import expert_use


@pytest.fixture
def architecture():
    config = CONFIGS["dbrx"]()
    config.architectures = ["DbrxForCausalLM"]
    return describe(config)


def write(folder, coverage):
    (folder / "measurement.json").write_text(json.dumps({"format_version": 2, "coverage": coverage}))


def shares(*values):
    return [{"tokens": 1, "share": value, "mean_weight": 0.5} for value in values]


def test_without_a_measurement_all_experts_are_alike(tmp_path, architecture):
    assert expert_use(tmp_path, architecture) == ({0: (0.5,) * 4, 1: (0.5,) * 4}, False)
    (tmp_path / "measurement.json").write_text('{"measurement": {}}')  # of exllamav2
    assert expert_use(tmp_path, architecture)[1] is False


def test_a_chance_is_the_share_of_all_choices_times_those_of_a_token(tmp_path, architecture):
    write(tmp_path, {"0": shares(0.5, 0.25, 0.25, 0), "1": shares(0.1, 0.2, 0.3, 0.4)})
    use, measured = expert_use(tmp_path, architecture)
    assert measured
    assert use[0] == (1.0, 0.5, 0.5, 0.0)
    assert use[1] == pytest.approx((0.2, 0.4, 0.6, 0.8))


@pytest.mark.parametrize(
    "coverage",
    [
        {"0": shares(0.5, 0.5), "1": shares(0.1, 0.2, 0.3, 0.4)},
        {"0": shares(0.5, 0.5, 0.5, 0.5), "1": shares(0.1, 0.2, 0.3, 0.4)},
        {"0": shares(0.5, 0.6, -0.1, 0), "1": shares(0.1, 0.2, 0.3, 0.4)},
        {"0": shares(0.25, 0.25, 0.25, "0.25"), "1": shares(0.1, 0.2, 0.3, 0.4)},
        {"0": shares(0.1, 0.2, 0.3, 0.4)},
        [],
    ],
)
def test_a_measurement_of_something_else_is_an_error_that_names_it(tmp_path, architecture, coverage):
    write(tmp_path, coverage)
    with pytest.raises(CheckpointError, match=r"measurement\.json: .*measure again, or move it away"):
        expert_use(tmp_path, architecture)
