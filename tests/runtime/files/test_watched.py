"""A file that is written to, replaced, cut or removed is seen; one that was only touched is not changed."""

import os

import pytest

from dbrx_quant.runtime.files import watched
from dbrx_quant.runtime.files.watched import ChangedError, WatchedFile


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(1, 1))
    return path


def replace(path, content):
    other = path.with_name("other")
    other.write_bytes(content)
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.write_bytes(b"0123x56789"), "has been written to or replaced"),
        (lambda path: replace(path, b"0123x56789"), "has been written to or replaced"),
        (lambda path: os.truncate(path, 3), "has 3 bytes instead of 10"),
        (lambda path: path.unlink(), "is gone"),
    ],
)
def test_a_change_is_told(file, change, what):
    known = WatchedFile(file)
    change(file)
    with pytest.raises(ChangedError, match=rf"config\.json: {what} since it was opened"):
        known.check()


def test_a_file_that_appears_is_a_change(tmp_path):
    known = WatchedFile(tmp_path / "added_tokens.json")
    known.check()
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(ChangedError, match="has appeared"):
        known.check()


@pytest.mark.parametrize("change", [os.utime, lambda path: replace(path, b"0123456789")])
def test_equal_contents_are_no_change(file, change):
    known = WatchedFile(file)
    change(file)
    known.check()


def test_of_a_large_file_only_the_same_with_the_same_time_is_unchanged(file, monkeypatch):
    monkeypatch.setattr(watched, "WHOLE_BYTES", 9)
    known = WatchedFile(file)
    os.chmod(file, 0o600)
    known.check()
    os.utime(file)
    with pytest.raises(ChangedError, match="has been written to or replaced"):
        known.check()
