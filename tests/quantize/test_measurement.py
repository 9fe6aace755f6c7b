"""What is written of a measurement and a strategy is read back, and nothing that does not fit is taken."""

import copy
import json
from dataclasses import replace

import pytest
from measurements import linear, measurement

from dbrx_quant.calibration.blocks.routing import ExpertCoverage
from dbrx_quant.quantize.budget.allocate import allocate
from dbrx_quant.quantize.budget.strategy import Outcome, find_strategy, read_strategy, write_strategy
from dbrx_quant.quantize.measurement import (
    HEAD,
    Option,
    find_measurement,
    read_measurement,
    write_measurement,
)
from dbrx_quant.runtime.exl2.format import Group
from dbrx_quant.runtime.files.errors import CheckpointError

OPTIONS = [(4800, 0.5, "3:32x2 2:32"), (9600, 0.25, "4:96")]
NAME = "model.layers.0.mlp.experts.0.w1"


@pytest.fixture
def made():
    return measurement(
        {NAME: linear((96, 32), OPTIONS, "gate"), HEAD: linear((96, 64), OPTIONS, "head")},
        tokens=128,
        coverage={10: (ExpertCoverage(3, 0.5, 0.25),), 2: (ExpertCoverage(0, 0.0, 0.0),)},
        model={"config.json": "2-aa"},
        calibration={"source": "offline", "rows": 4},
    )


@pytest.fixture
def file(made, tmp_path):
    write_measurement(tmp_path / "measurement.json", made)
    return tmp_path / "measurement.json"


def test_a_measurement_is_read_back_as_it_was(made, file):
    found = read_measurement(file)
    assert found == made
    assert list(found.coverage) == [2, 10], "blocks are in the order of their numbers"
    assert found.decoder_weights == 96 * 32
    assert found.linears[NAME].options[0].group_map == (Group(3, 32), Group(3, 32), Group(2, 32))


def test_a_priced_linear_has_its_errors_multiplied(made):
    priced = made.linears[NAME].priced(2.0)
    assert [option.error for option in priced.options] == [1.0, 0.5]
    assert (priced.energy, priced.price) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("format_version",), 1, "version 1, this program reads 2; measure again"),
        (("format_version",), True, "version True"),
        (("tokens",), -1, "tokens is -1"),
        (("linears",), {}, "linears is empty"),
        (("linears",), [], "linears is list, expected an object"),
        (("coverage",), {"x": []}, "coverage is not keyed by block number"),
        (("coverage", "2"), [{"tokens": 1}], "share is missing"),
        (("model", "config.json"), 3, "expected a string"),
        (("linears", NAME, "shape"), [96], "expected input and output channels"),
        (("linears", NAME, "shape"), [96, 1 << 40], "expected input and output channels"),
        (("linears", NAME, "options"), [], "not a list of rising bits"),
        (("linears", NAME, "options"), [[2, 0.1, "2:96"], [2, 0.1, "2:96"]], "rising bits"),
        (("linears", NAME, "options"), [[2, 0.1, "2:96"], [3, 0.2, "3:96"]], "falling error"),
        (("linears", NAME, "options"), [[2, 0.1]], "expected bits, error and group map"),
        (("linears", NAME, "options"), [[2, None, "2:96"]], "expected bits, error and group map"),
        (("linears", NAME, "options"), [[2, 0.1, "2:64"]], "expected a group map of 96 rows"),
        (("linears", NAME, "options"), [[2, 0.1, "2:32x99999999999"]], "expected a group map of 96 rows"),
        (("linears", NAME, "feedback"), [1.0], "1 values, expected 6 numbers"),
        (("linears", NAME, "feedback"), ["a"] * 6, "feedback"),
        (("linears", NAME, "energy"), "much", "energy is 'much', expected a number"),
        (("linears", NAME, "price"), -1.0, "price is -1.0"),
        (("linears", NAME, "unseen"), None, "unseen is None"),
    ],
)
def test_what_does_not_fit_is_refused_with_file_and_place(file, path, value, told):
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as refused:
        read_measurement(file)
    assert told in str(refused.value)
    assert str(file) in str(refused.value)
    assert len(path) < 3 or NAME in str(refused.value)


def test_every_field_is_asked_for(file):
    content = json.loads(file.read_text())
    for path in [(key,) for key in content] + [("linears", NAME, key) for key in content["linears"][NAME]]:
        damaged = copy.deepcopy(content)
        inner = damaged
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        file.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=f"{path[-1]} is missing"):
            read_measurement(file)


def test_a_measurement_of_another_converter_is_left_aside(tmp_path):
    assert find_measurement(tmp_path) is None
    (tmp_path / "measurement.json").write_text('{"measurement": {}, "last_module_idx": 7}')
    assert find_measurement(tmp_path) is None
    (tmp_path / "measurement.json").write_text('{"linears": {}}')
    with pytest.raises(CheckpointError, match="format_version is missing"):
        find_measurement(tmp_path)


def test_a_strategy_is_read_back_with_its_outcome(made, tmp_path):
    scores = {"kl": 0.1, "top1": 0.9, "ppl": 3.0, "reference_ppl": 2.9, "kl_stderr": None}
    strategy, outcome = allocate(made, 3.0, 3), Outcome("text.txt", scores, ["a note"])
    write_strategy(tmp_path / "strategy.json", strategy)
    assert read_strategy(tmp_path / "strategy.json") == (strategy, None)
    write_strategy(tmp_path / "strategy.json", strategy, outcome)
    assert find_strategy(tmp_path) == (strategy, outcome)
    assert strategy.choices[HEAD] == Option(*OPTIONS[1])


def test_a_predicted_kl_just_below_zero_is_read_back(made, tmp_path):
    strategy = replace(allocate(made, 3.0, 3), kl=-1e-8)  # the rounding of log-probabilities, at many bits
    write_strategy(tmp_path / "strategy.json", strategy)
    assert read_strategy(tmp_path / "strategy.json") == (strategy, None)


def test_a_strategy_from_before_files_were_marked_is_read(made, tmp_path):
    file = tmp_path / "strategy.json"
    assert find_strategy(tmp_path) is None
    write_strategy(file, allocate(made, 3.0, 3))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "format_version"}))
    assert read_strategy(file)[0] == allocate(made, 3.0, 3)
    file.write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this program reads 1"):
        read_strategy(file)
