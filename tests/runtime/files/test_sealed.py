"""Files with a checksum beside them, and folders with a lock."""

import os
import threading
import time

import pytest

from dbrx_quant.runtime.files import sealed
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import JsonFile
from dbrx_quant.runtime.files.lock import LOCK_NAME, locked


def test_every_single_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"sealed")
    sealed.seal(path)
    sealed.check_seal(path)
    for at in range(8 * 6):
        data = bytearray(b"sealed")
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=r"x\.json: damaged since it was written; run the same command"
        ):
            sealed.check_seal(path)


def test_a_sealed_kind_of_json_is_written_and_read_with_its_checksum(tmp_path):
    file, path = JsonFile("a thing", 1, "make it again", sealed=True), tmp_path / "x.json"
    with pytest.raises(FileNotFoundError):
        file.read(path)
    file.write(path, {"a": 1})
    assert file.read(path).integer("a") == 1
    path.write_text('{"a": 2, "format_version": 1}')
    with pytest.raises(CheckpointError, match="damaged since it was written"):
        file.read(path)


def test_a_file_is_removed_with_its_checksum(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("x")
    sealed.seal(path)
    sealed.remove(path)
    sealed.remove(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["", "0123abc", "g" * 64])
def test_a_part_of_a_checksum_is_none_and_binds_nobody(part, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("x")
    (tmp_path / ".x.json.sha256").write_text(part)
    assert sealed.seal_fault(path) == "there is no checksum of it"
    sealed.seal_again(path)
    sealed.flush_seal(path)
    sealed.check_seal(path)
    path.write_text("y")
    with pytest.raises(CheckpointError, match=r"x\.json: was damaged, and comes out otherwise"):
        sealed.seal_again(path)


def test_a_lock_is_gone_at_the_end_and_so_is_a_folder_that_stayed_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert (folder / LOCK_NAME).is_file()
    assert not list(tmp_path.iterdir())
    with locked(folder):
        (folder / "x").touch()
    assert [path.name for path in folder.iterdir()] == ["x"]
    (folder / "x").unlink()
    with locked(folder):
        pass
    assert folder.is_dir(), "it was there before"


def test_what_a_killed_process_left_does_not_lock_and_keeps_its_contents_until_then(tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", tmp_path / LOCK_NAME)
    with locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_patient_one_waits_and_others_are_refused(tmp_path):
    inside, order = threading.Event(), []

    def first():
        with locked(tmp_path):
            inside.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with pytest.raises(ValueError, match="another process is working in this folder"), locked(tmp_path):
        pass
    with locked(tmp_path, patience=60):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_many_at_once_are_never_inside_together(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path, patience=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 80
