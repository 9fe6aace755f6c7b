"""A link that leads out of a model folder is not followed; those of the Hub's cache stay inside."""

import pytest

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.links import leaves, refuse_links_out


@pytest.fixture
def snapshot(tmp_path):
    """The folder of a revision in a Hub cache."""
    for name in ("one", "two"):
        (tmp_path / f"models--org--{name}" / "blobs").mkdir(parents=True)
        (tmp_path / f"models--org--{name}" / "blobs" / "ab").write_text("blob")
    folder = tmp_path / "models--org--one" / "snapshots" / "rev"
    folder.mkdir(parents=True)
    (tmp_path / "token").write_text("secret")
    return folder


@pytest.mark.parametrize(
    ("target", "out"),
    [
        ("other.md", False),
        ("../../blobs/ab", False),
        ("../rev/other.md", False),
        ("../../../token", True),
        ("../../blobs/../../token", True),
        ("../../../models--org--two/blobs/ab", True),
        ("../../../nowhere", True),
    ],
)
def test_links_lead_out_unless_to_the_folder_or_its_own_blobs(snapshot, target, out):
    (snapshot / "NOTES.md").symlink_to(target)
    assert leaves(snapshot / "NOTES.md") is out


def test_a_blob_that_is_itself_a_link_leads_out(snapshot):
    (snapshot.parent.parent / "blobs" / "cd").symlink_to("../../token")
    (snapshot / "NOTES.md").symlink_to("../../blobs/cd")
    assert leaves(snapshot / "NOTES.md")


def test_a_folder_that_is_reached_by_a_link_is_still_its_files_home(snapshot, tmp_path):
    (snapshot / "README.md").symlink_to("../../blobs/ab")
    (tmp_path / "model").symlink_to(snapshot)
    assert not leaves(tmp_path / "model" / "README.md")


def test_the_refusal_names_link_and_target(snapshot):
    (snapshot / "config.json").symlink_to("../../../token")
    with pytest.raises(CheckpointError, match=r"config\.json: is a link to .*token, outside of the folder"):
        refuse_links_out([snapshot / "absent", snapshot / "config.json"])
