"""`repacked.bin`: made as a stream, tied to its shards, and never believed where it is damaged."""

import json
import random
import shutil

import pytest
from quant_models import CONFIGS, build_quantized_folder
from tiny_output import make_output

from dbrx_quant.quantize.publish.release import branch_files
from dbrx_quant.runtime.families import describe
from dbrx_quant.runtime.families.config import load_config
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder import repacked_file
from dbrx_quant.runtime.folder.contents import read_contents
from dbrx_quant.runtime.folder.repacked_file import (
    REPACKED_NAME,
    OtherShardsError,
    open_repacked,
    plan_repacked,
    repacked_faults,
    write_repacked,
)
from dbrx_quant.runtime.folder.verify import verify

TAIL = 16


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = make_output(tmp_path_factory.mktemp("finished"), max_shard_bytes=60_000)
    write_repacked(contents_of(out))
    return out


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def contents_of(folder):
    architecture = describe(load_config(folder))
    return read_contents(architecture, architecture.open(folder))


def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def change_footer(path, edit):
    """Let `edit` change the footer, and put its length right."""
    data = path.read_bytes()
    length = int.from_bytes(data[-TAIL:-8], "little")
    content = json.loads(data[-TAIL - length : -TAIL])
    edit(content)
    text = json.dumps(content).encode()
    path.write_bytes(data[: -TAIL - length] + text + len(text).to_bytes(8, "little") + data[-8:])


def test_equal_shards_make_equal_bytes(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    (other / REPACKED_NAME).unlink()
    write_repacked(contents_of(other))
    assert (other / REPACKED_NAME).read_bytes() == (finished / REPACKED_NAME).read_bytes()


def test_a_file_opens_with_the_places_and_checksums_that_it_was_written_with(folder):
    contents = contents_of(folder)
    written = write_repacked(contents)
    assert open_repacked(contents) == written
    assert all(place.start % 4096 == 0 for place in written.places)
    (folder / REPACKED_NAME).unlink()
    assert open_repacked(contents) is None


def test_one_linear_at_a_time_is_in_memory_while_it_is_written(folder, monkeypatch):
    alive, most, made = [], [], repacked_file.repack

    def counted(*arguments):
        block = made(*arguments)
        alive.append(block.body)
        most.append(sum(1 for body in alive if _referenced(body)))
        return block

    import sys

    def _referenced(body):
        return sys.getrefcount(body) > 4  # ours, the list's, the loop's and the argument's

    monkeypatch.setattr(repacked_file, "repack", counted)
    write_repacked(contents_of(folder))
    assert max(most) <= 2


def test_without_room_on_the_disk_nothing_is_written(folder, monkeypatch):
    (folder / REPACKED_NAME).unlink()
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(OSError, match=r"\d+ bytes required, 50000 free") as raised:
        write_repacked(contents_of(folder))
    assert raised.value.filename == str(folder / REPACKED_NAME)
    assert not list(folder.glob(f"*{REPACKED_NAME}*"))


def test_a_file_of_other_shards_is_told_apart(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    flip(shard, -40)
    with pytest.raises(
        OtherShardsError, match=f"made of other shards than those beside it .{shard.name} differs"
    ):
        open_repacked(contents_of(folder))


def test_a_shard_that_has_another_hash_by_checksums_json_is_another(folder):
    path = folder / "checksums.json"
    content = json.loads(path.read_text())
    name = sorted(content["files"])[0]
    content["files"][name]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(OtherShardsError, match=f"{name} differs"):
        open_repacked(contents_of(folder))


def test_checksums_that_are_missing_say_nothing(folder):
    (folder / "checksums.json").unlink()
    assert open_repacked(contents_of(folder)) is not None


@pytest.mark.parametrize("key", ["layout", "format_version"])
def test_a_file_of_another_version_is_not_used(folder, key):
    change_footer(folder / REPACKED_NAME, lambda content: content.update({key: 2}))
    with pytest.raises(OtherShardsError, match=f"{key} 2, this program reads 1"):
        open_repacked(contents_of(folder))


BROKEN = {
    "no list of linears": lambda content: content.pop("linears"),
    "a linear less": lambda content: content["linears"].pop(next(iter(content["linears"]))),
    "a checksum that is a number": lambda content: content["linears"].update(
        dict.fromkeys(content["linears"], 7)
    ),
    "a checksum with a sign": lambda content: content["linears"].update(
        dict.fromkeys(content["linears"], "-" + 15 * "0")
    ),
    "a long checksum": lambda content: content["linears"].update(dict.fromkeys(content["linears"], "0" * 17)),
    "no shards": lambda content: content.pop("shards"),
    "shards that are a list": lambda content: content.update(shards=[1]),
    "a layout that is a text": lambda content: content.update(layout="1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_footer_that_is_none_is_an_error_that_names_the_file(folder, what):
    change_footer(folder / REPACKED_NAME, BROKEN[what])
    with pytest.raises(CheckpointError, match=REPACKED_NAME):
        open_repacked(contents_of(folder))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**7])
def test_a_footer_cannot_be_longer_than_the_file(folder, length):
    path = folder / REPACKED_NAME
    data = path.read_bytes()
    path.write_bytes(data[:-TAIL] + length.to_bytes(8, "little") + data[-8:])
    with pytest.raises(CheckpointError, match=REPACKED_NAME):
        open_repacked(contents_of(folder))


def test_a_file_that_is_cut_or_has_too_much_is_refused_at_every_length(folder):
    path, contents = folder / REPACKED_NAME, contents_of(folder)
    data = path.read_bytes()
    chosen = random.Random(0)
    for length in [0, 1, 15, 16, 17, len(data) - 1, *chosen.sample(range(len(data)), 12)]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=REPACKED_NAME):
            open_repacked(contents)
    for more in (bytes(1), bytes(4096)):
        path.write_bytes(more + data)
        with pytest.raises(CheckpointError, match=REPACKED_NAME):
            open_repacked(contents)


def test_a_flipped_bit_anywhere_that_counts_is_found_when_all_is_compared(folder):
    """Between the bodies there are zeros up to the next page, which nothing reads."""
    path, contents = folder / REPACKED_NAME, contents_of(folder)
    places = plan_repacked(contents)
    footer = places[-1].start + -(-places[-1].body_bytes // 4096) * 4096
    counted = [at for p in places[::5] for at in (p.start, p.start + p.body_bytes - 1)]
    counted += random.Random(1).sample(range(footer, path.stat().st_size), 20)
    for index, at in enumerate(counted):
        bit = (1, 128)[index % 2]
        flip(path, at, bit)
        faults, warnings = repacked_faults(contents, lambda count: None)
        assert faults or warnings, at - footer
        flip(path, at, bit)


def test_verify_names_a_linear_that_is_not_what_its_shard_makes(folder):
    assert verify(folder).ok
    assert verify(folder).facts["repacked"] is True
    place = plan_repacked(contents_of(folder))[4]
    flip(folder / REPACKED_NAME, place.start + 70)
    (fault,) = verify(folder).faults
    assert f"{REPACKED_NAME}: {place.spec.name}: is not what its shard makes" in fault
    assert verify(folder, checksums=False).ok, "whole files are not read then"


def test_verify_sees_through_a_checksum_that_was_made_to_fit(folder):
    contents = contents_of(folder)
    file = open_repacked(contents)
    place = file.places[2]
    flip(file.path, place.start + 3)
    forged = next(sum for sum in file.checksums.values() if sum != file.checksums[place.spec.name])
    change_footer(file.path, lambda content: content["linears"].update({place.spec.name: f"{forged:016x}"}))
    assert any(place.spec.name in fault for fault in verify(folder).faults)


def test_verify_warns_of_a_file_that_nothing_reads(folder):
    change_footer(folder / REPACKED_NAME, lambda content: content.update(layout=9))
    report = verify(folder)
    assert report.ok
    assert any("layout 9" in warning for warning in report.warnings)
    assert report.facts["repacked"] is False


def test_verify_counts_every_byte_of_shards_and_file_once(folder):
    calls = []
    verify(folder, progress=lambda done, total: calls.append((done, total)))
    files = [*folder.glob("*.safetensors"), folder / REPACKED_NAME]
    total = sum(file.stat().st_size for file in files)
    assert {said for _, said in calls} == {total}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert total - 5000 < calls[-1][0] <= total, "but for the footer"


def test_a_new_conversion_removes_the_file(folder):
    again = folder.parent / "again"
    again.mkdir()
    other = make_output(again)
    write_repacked(contents_of(other))
    make_output(again, source=again / "source")
    assert not (other / REPACKED_NAME).exists()


def test_the_file_is_not_uploaded(folder):
    assert (folder / REPACKED_NAME).exists()
    assert REPACKED_NAME not in branch_files(folder)
    assert "config.json" in branch_files(folder)


def test_linears_that_the_integer_kernels_cannot_take_have_no_body(tmp_path):
    made = build_quantized_folder(CONFIGS["llama"](), tmp_path / "m")
    name = "model.layers.0.mlp.up_proj"
    made.tensors[f"{name}.q_scale_max"].fill_(60000)
    made.tensors[f"{name}.q_scale"].zero_()  # no scale is that large, but one might be
    made.write()
    contents = contents_of(tmp_path / "m")
    file = write_repacked(contents)
    assert [key for key, sum in file.checksums.items() if sum is None] == [name]
    assert name not in file.mapped_bodies()
    assert repacked_faults(contents, lambda count: None) == ([], [])
