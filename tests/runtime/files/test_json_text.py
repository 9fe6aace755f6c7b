"""JSON that readers would take differently, or not at all, is refused by the name of its file."""

import json
import os

import pytest

from dbrx_quant.quantize.budget.strategy import read_strategy
from dbrx_quant.quantize.measurement import find_measurement, read_measurement
from dbrx_quant.quantize.output.record import read_record
from dbrx_quant.runtime.evaluation.record import read_evaluations
from dbrx_quant.runtime.exl2.checkpoint import read_index
from dbrx_quant.runtime.families.config import load_config, read_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.json_text import load_json, parse_json
from dbrx_quant.runtime.folder.checksums import read_checksums
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.runtime.tokenizer.ids import read_object, special_ids

BAD = {
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a": ' * 500 + b"1" + b"}" * 500,
    "infinity": b'{"a": Infinity}',
    "nan": b'{"a": [NaN]}',
    "beyond doubles": b'{"a": -1e999}',
    "huge integer": b'{"a": 1' + b"0" * 400 + b"}",
    "unparsable integer": b'{"a": ' + b"9" * 10_000 + b"}",
    "two values": b'{"a": 1, "b": 2, "a": 3}',
    "not utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "half a character": b'{"a": "\\ud800"}',
    "empty": b"",
    "zeros": bytes(100),
    "cut": b'{"a": {"b": "c',
    "two objects": b"{}{}",
    "a list": b"[1]",
}


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '["\\ud83d\\ude00", -0.5, 1e308]', "[" * 100 + "]" * 100]
)
def test_what_everybody_reads_alike_is_read(text):
    assert parse_json(text) == json.loads(text)


def test_large_integers_of_tokenizer_configs_are_read():
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')


READERS = {
    "config.json": (read_config, load_config, verify),
    "generation_config.json": (special_ids, verify),
    "tokenizer_config.json": (special_ids, verify),
    "special_tokens_map.json": (lambda folder: read_object(folder / "special_tokens_map.json"), verify),
    "tokenizer.json": (special_ids, verify),
    "model.safetensors.index.json": (read_index, verify),
    "checksums.json": (read_checksums, verify),
    "strategy.json": (lambda folder: read_strategy(folder / "strategy.json"), verify),
    "measurement.json": (
        lambda folder: read_measurement(folder / "measurement.json"),
        find_measurement,
        verify,
    ),
    "conversion.json": (read_record, verify),
    "evaluation.json": (read_evaluations, verify),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    from tiny_output import make_output

    return make_output(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_a_folder_names_the_file_that_is_no_sound_json(name, kind, sound, tmp_path):
    for file in sound.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(BAD[kind])
    for reader in READERS[name]:
        if reader is verify:
            faults = verify(tmp_path, checksums=False).faults
            assert any(name in fault for fault in faults), faults
        else:
            with pytest.raises(CheckpointError, match=name):
                reader(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        load_json(tmp_path / "pipe.json")
    with pytest.raises(
        CheckpointError, match=r"pipe\.json: not a list \(not a regular file\); make it again"
    ):
        JsonFile("a list", 1, "make it again").read(tmp_path / "pipe.json")


def test_numbers_are_held_against_what_a_double_holds(tmp_path):
    file = JsonFile("numbers", 1, "make it again")
    path = tmp_path / "n.json"
    path.write_text(json.dumps({"format_version": 1, "large": 10**308, "fraction": 0.5}))
    assert file.read(path).number("large") == 1e308
    with pytest.raises(CheckpointError, match=r"n\.json: fraction is 0\.5, expected a whole number"):
        file.read(path).integer("fraction")
