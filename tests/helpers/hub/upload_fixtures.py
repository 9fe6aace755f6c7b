"""Fixtures of the tests of `upload`, a plugin of theirs: two quantized folders, and a Hub for them."""

import shutil
import time

import hub_server
import pytest
from hub_server import TOKEN
from tiny_output import make_output
from upload_runs import BASE, CARD, REPO, measured_of, retarget

from dbrx_quant.quantize.measurement import write_measurement
from dbrx_quant.quantize.publish import upload as publishing
from dbrx_quant.scripts.cli.main import main


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two quantized folders as `convert --bpw 3.0,4.0` leaves them, of a gated original."""
    folder = tmp_path_factory.mktemp("upload")
    out = make_output(folder, max_shard_bytes=40_000)
    (out / "README.md").write_text(CARD, encoding="utf-8")
    (out / "LICENSE.txt").write_text("the licence\n", encoding="utf-8")
    (out / "NOTICE.txt").write_text("the notice\n", encoding="utf-8")
    (out / ".cache").mkdir()
    (out / ".token").write_text(TOKEN, encoding="utf-8")
    write_measurement(out / "measurement.json", measured_of(out))
    both = folder / "both"
    for bits in (3.0, 4.0):
        shutil.copytree(out, both / f"{bits}bpw")
        retarget(both / f"{bits}bpw", bits)
    return both


@pytest.fixture
def both(made, tmp_path):
    """A copy of them to change."""
    return shutil.copytree(made, tmp_path / "both")


@pytest.fixture
def hub(monkeypatch):
    """A running Hub that huggingface_hub takes for the real one; waiting takes no time."""
    from huggingface_hub import constants

    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.waits = []
        monkeypatch.setattr(time, "sleep", hub.waits.append)
        monkeypatch.setattr(publishing, "error_curve_png", draw)
        yield hub


def draw(points, path, **_):
    """In place of the picture, which takes matplotlib half a second."""
    path.write_bytes(b"png" + repr(points).encode())


@pytest.fixture
def upload(capsys, hub):
    """Runs the command; gives its exit code, stdout and stderr, which never hold the token."""

    def run(*arguments):
        code = main(["upload", *map(str, arguments), REPO, "--base-model", BASE, "--quiet"])
        captured = capsys.readouterr()
        for text in (captured.out, captured.err):
            assert TOKEN not in text
            assert "signedSecret" not in text
        return code, captured.out, captured.err

    return run
