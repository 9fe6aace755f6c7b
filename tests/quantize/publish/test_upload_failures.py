"""Uploads to a Hub that fails or refuses: what is tried again, and what is said; no token is ever shown."""

import json
import logging
import signal

import pytest
from hub_server import TOKEN
from upload_runs import BASE, REPO, sent

from dbrx_quant.quantize.publish.release import gather
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.scripts.cli.main import main

pytest_plugins = ["upload_fixtures"]


def test_an_upload_that_was_cut_off_goes_on_where_it_was(made, hub, upload):
    shards = len(list((made / "3.0bpw").glob("*.safetensors")))
    assert shards > 2
    hub.fail("POST", "/commit/4.0bpw", 403)
    assert upload(made)[0] == 1
    assert hub.asked("POST", "/commit/3.0bpw") == 1
    puts = hub.asked("PUT", "/lfs/")
    code, output, _ = upload(made, "--json")
    assert code == 0
    assert sent(output)["3.0bpw"] == []
    assert len(sent(output)["4.0bpw"]) > shards
    assert hub.asked("PUT", "/lfs/.*") - puts <= 1, "the picture at most: all shards were in the store"


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_amid_a_shard_ends_with_what_to_do_and_the_same_command_goes_on(
    made, hub, upload, number, expected
):
    hub.fail("PUT", "/lfs/", -number)
    code, _, error = upload(made / "3.0bpw")
    assert code == expected
    assert error.splitlines()[-1] == "dbrx-quant: interrupted; run the same command again to continue"
    assert "3.0bpw" not in [b for b, commits in hub.repos[REPO].history.items() if len(commits) > 1]
    assert upload(made / "3.0bpw")[0] == 0
    assert hub.repos[REPO].files("3.0bpw")["NOTICE.txt"] == b"the notice\n"


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "wait"),
    [
        ("GET", "/api/whoami-v2", 500, {}, 1),
        ("POST", "/api/repos/create", 502, {}, 1),
        ("POST", "/branch/3.0bpw", 429, {"Retry-After": "7"}, 7),
        ("POST", "/branch/3.0bpw", 429, {"ratelimit": '"api";r=0;t=55'}, 56),
        ("GET", "/refs", 503, {}, 1),
        ("POST", "/preupload/", 500, {}, 1),
        ("POST", "/objects/batch", 429, {"Retry-After": "3"}, 4),
        ("PUT", "/lfs/", 500, {}, 1),
        ("PUT", "/lfs/", 0, {}, 1),
        ("POST", "/commit/3.0bpw", 500, {}, 1),
        ("POST", "/commit/3.0bpw", 429, {"Retry-After": "9"}, 9),
        ("POST", "/commit/3.0bpw", 0, {}, 1),
        ("GET", "/tree/3.0bpw", 0, {}, 1),
    ],
)
def test_what_fails_once_is_tried_again_after_the_wait_that_the_hub_asks_for(
    made, hub, upload, method, path, status, headers, wait
):
    if path == "/refs":
        hub.add(REPO)
    hub.fail(method, path, status, headers=headers)
    code, _, error = upload(made / "3.0bpw")
    assert code == 0, error
    assert hub.failures[0].times == 0, "the failure was met"
    assert wait in hub.waits
    folder = made / "3.0bpw"
    files = hub.repos[REPO].files("3.0bpw")
    assert all(files[path.name] == path.read_bytes() for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "advice"),
    [
        ("GET", "/api/whoami-v2", 401, {}, "hf auth login"),
        ("POST", "/api/repos/create", 403, {}, "needs write access to me"),
        ("POST", "/commit/3.0bpw", 403, {}, "needs write access to me"),
        ("PUT", "/lfs/", 403, {}, "needs write access to me"),
        ("HEAD", "/resolve/main/README.md", 403, {"X-Error-Code": "GatedRepo"}, "is gated"),
        ("POST", "/commit/3.0bpw", 429, {"Retry-After": "1"}, "run the same command again"),
        ("POST", "/branch/3.0bpw", 429, {"Retry-After": "86400"}, "run the same command again"),
        ("POST", "/commit/3.0bpw", 500, {}, "run the same command again"),
        ("PUT", "/lfs/", 0, {}, "run the same command again"),
        ("POST", "/commit/3.0bpw", 413, {}, "refused with status 413"),
    ],
)
def test_what_fails_for_good_ends_in_one_line_that_says_what_to_do(
    made, hub, upload, method, path, status, headers, advice
):
    if "resolve" in path:
        hub.add(REPO)
    hub.fail(method, path, status, times=1000, headers=headers)
    code, output, error = upload(made / "3.0bpw")
    assert code == 1
    assert output == ""
    errors = [line for line in error.splitlines() if line.startswith("dbrx-quant: error: ")]
    assert len(errors) == 1
    assert advice in errors[0]
    assert "Traceback" not in error


def test_with_xet_small_files_go_up_and_a_refusal_of_its_storage_is_explained(both, hub, upload, monkeypatch):
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    assert upload(both / "3.0bpw")[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # its storage has no double here
    (both / "3.0bpw" / "NOTES.md").write_text("new\n", encoding="utf-8")
    assert sent(upload(both / "3.0bpw", "--json")[1])["3.0bpw"] == ["NOTES.md"]
    assert hub.repos[REPO].files("3.0bpw")["NOTES.md"] == b"new\n"
    hub.fail("GET", "/xet-write-token/", 403)
    code, _, error = upload(both / "4.0bpw")
    assert code == 1
    assert "needs write access to me" in error


def test_a_branch_and_a_repository_that_are_there_already_are_fine(made, hub, upload):
    hub.add(REPO)
    hub.fail("GET", f"/api/models/{REPO}$", 404, headers={"X-Error-Code": "RepoNotFound"})
    hub.repos[REPO].history["3.0bpw"] = list(hub.repos[REPO].history["main"])
    assert upload(made / "3.0bpw")[0] == 0  # both answer 409
    assert hub.asked("POST", "/api/repos/create") == 1
    assert hub.asked("POST", "/branch/3.0bpw") == 1


def test_without_a_token_or_with_one_that_only_reads_nothing_is_tried(
    made, hub, upload, monkeypatch, tmp_path
):
    hub.role = "read"
    code, _, error = upload(made)
    assert code == 1
    assert "the token is read-only" in error
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, error = upload(made)
    assert code == 1
    assert "hf auth login" in error
    assert {path for _, path in hub.requests} == {"/api/whoami-v2"}


def test_a_token_is_not_printed_even_where_a_library_or_the_server_repeats_it(
    made, hub, upload, monkeypatch, capsys
):
    hub.fail("POST", "/api/repos/create", 403, body=json.dumps({"error": f"bad token {TOKEN}"}).encode())
    code, _, error = upload(made, "--debug")
    assert code == 1
    assert "<token>" in error
    assert "Traceback" in error
    broken = "hf_broken\x7fToken12345678"  # httpx refuses the header, and repeats it
    monkeypatch.setenv("HF_TOKEN", broken)
    for debug in ([], ["--debug"]):
        assert main(["upload", str(made), REPO, "--base-model", BASE, "--quiet", *debug]) == 1
        shown = capsys.readouterr()
        assert "Token12345678" not in shown.out + shown.err
        assert "hf_broken" not in shown.out + shown.err
    hub.fail("POST", "/commit/", 500, times=1)


def test_warnings_of_the_library_lose_tokens_and_signatures_while_we_upload(made, hub, upload):
    hub.fail("PUT", "/lfs/", 500)
    records = []
    logger = logging.getLogger("huggingface_hub")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        assert upload(made / "3.0bpw")[0] == 0
    finally:
        logger.removeHandler(handler)
    assert any("HTTP Error 500" in text for text in records)
    assert not [text for text in records if "signedSecret" in text]


def test_a_gate_may_hide_the_originals_card_but_a_hub_that_fails_is_not_taken_for_one(both, hub, upload):
    hub.add(BASE, gated="auto")
    hub.fail("HEAD", f"/{BASE}/resolve/", 503, times=1000)
    code, _, error = upload(both)
    assert code == 1
    assert "failed with status 503" in error
    assert REPO not in hub.repos
    hub.failures[0].status, hub.failures[0].headers = 403, {"X-Error-Code": "GatedRepo"}
    assert upload(both)[0] == 0


@pytest.mark.parametrize("name", ["NOTES.md", "README.md", "model.safetensors"])
def test_a_folder_with_a_link_out_of_it_is_not_published(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*secret, outside of the folder"):
        gather("org/name", [tmp_path / "out"])
