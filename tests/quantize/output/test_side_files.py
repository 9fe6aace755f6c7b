"""What goes with a model is carried over; what belongs to the original's weights is not."""

import pytest

from dbrx_quant.quantize.output import side_files
from dbrx_quant.quantize.output.side_files import copy_side_files
from dbrx_quant.runtime.files.errors import CheckpointError


@pytest.fixture
def folders(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    return source, out


def fill(folder, *names):
    for name in names:
        (folder / name).write_bytes(f"\0{name}\r\n".encode())


def test_licences_readme_and_vocabulary_are_carried_over_byte_for_byte(folders):
    source, out = folders
    names = ("LICENSE", "LICENSE.txt", "NOTICE.txt", "README.md", "USE_POLICY.md", "merges.txt", "vocab.json")
    fill(source, *names)
    report = copy_side_files(source, out)
    assert report.copied == tuple(sorted(names))
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors.index.json", "an index"),
        ("pytorch_model.bin.index.json", "an index"),
        ("model-00001-of-00002.safetensors", "weights"),
        ("pytorch_model.bin", "weights"),
        ("model-q4.GGUF", "weights"),
        ("modeling_dbrx.py", "remote code"),
        ("config.json", "written anew"),
        ("tokenizer.json", "written anew"),
        ("checksums.json", "written anew"),
        (".gitattributes", "a hidden file"),
    ],
)
def test_files_of_the_unquantized_model_stay_behind_with_a_reason(folders, name, reason):
    source, out = folders
    fill(source, name)
    report = copy_side_files(source, out)
    assert list(out.iterdir()) == []
    assert report.skipped[name].startswith(reason)


def test_subfolders_stay_behind(folders):
    source, out = folders
    (source / "original").mkdir()
    fill(source / "original", "params.json")
    assert copy_side_files(source, out).skipped == {"original": "a subfolder"}
    assert list(out.iterdir()) == []


def test_large_files_stay_behind(folders, monkeypatch):
    source, out = folders
    monkeypatch.setattr(side_files, "LARGEST_BYTES", 4 << 20)
    with (source / "imatrix.dat").open("wb") as file:
        file.truncate((4 << 20) + 1)
    assert copy_side_files(source, out).skipped == {"imatrix.dat": "larger than 4 MB"}


def test_the_links_of_the_hubs_cache_are_copied_as_files(folders, tmp_path):
    blobs, source = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c"
    blobs.mkdir(parents=True)
    source.mkdir(parents=True)
    fill(blobs, "blob")
    (source / "LICENSE").symlink_to("../../blobs/blob")
    out = folders[1]
    copy_side_files(source, out)
    assert not (out / "LICENSE").is_symlink()
    assert (out / "LICENSE").read_bytes() == (blobs / "blob").read_bytes()


def test_a_dangling_link_is_reported(folders):
    source, out = folders
    (source / "LICENSE").symlink_to(source / "gone")
    assert copy_side_files(source, out).skipped == {"LICENSE": "not a regular file"}


def test_an_unreadable_file_is_an_error_naming_it(folders, monkeypatch):
    source, out = folders
    fill(source, "NOTICE.txt")

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(side_files.Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"NOTICE\.txt: cannot be read \(Input/output error\)"):
        copy_side_files(source, out)


def test_links_out_of_the_folder_stay_behind_with_their_target(folders, tmp_path):
    source, out = folders
    (tmp_path / "token").write_text("secret")
    (source / "NOTES.md").symlink_to(tmp_path / "token")
    (source / "README.md").symlink_to("../token")
    fill(source, "LICENSE")
    (source / "COPYING").symlink_to("LICENSE")
    report = copy_side_files(source, out)
    assert report.copied == ("COPYING", "LICENSE")
    assert report.skipped["NOTES.md"] == f"a link to {tmp_path / 'token'}, outside of the folder"
    assert set(report.skipped) == {"NOTES.md", "README.md"}
