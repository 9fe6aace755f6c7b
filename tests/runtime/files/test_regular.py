"""Only regular files are opened; anything else in a file's place is named at once instead of waited for."""

import os
import socket

import pytest

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.regular import check_model_folder, open_regular


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


THINGS = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a socket": make_socket,
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "vocab.txt"])
def test_what_has_the_name_of_a_file_and_is_none_is_named(tmp_path, thing, name):
    check_model_folder(tmp_path)
    THINGS[thing](tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: {thing}, expected a regular file"):
        check_model_folder(tmp_path)
    with pytest.raises((CheckpointError, OSError)):
        open_regular(tmp_path / name)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "config.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        check_model_folder(tmp_path)


def test_a_fifo_is_refused_whatever_its_name_and_among_further_templates(tmp_path):
    inner = tmp_path / "additional_chat_templates"
    inner.mkdir()
    os.mkfifo(inner / "tool_use.jinja")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: a FIFO"):
        check_model_folder(tmp_path)
    os.mkfifo(tmp_path / "anything")
    with pytest.raises(CheckpointError, match="anything: a FIFO"):
        check_model_folder(tmp_path)


def test_files_links_to_files_and_other_folders_are_taken(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"content")
    (tmp_path / "model.safetensors").symlink_to("a/model.safetensors")
    (tmp_path / "README.md").symlink_to("nowhere")
    check_model_folder(tmp_path)
    with open_regular(tmp_path / "model.safetensors") as file:
        assert file.read() == b"content"
