"""Models on the Hub by branch: ORG/NAME@BRANCH and --revision, in every verb that takes a model."""

import pytest
from cli_runs import run
from scripted_model import scripted_folder

from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.find import find_folder

pytest_plugins = ["upload_fixtures"]

REPO = "me/sizes"
VERBS = {
    "inspect": [],
    "verify": ["--quiet"],
    "tokenizer": ["--check"],
    "report": ["--json"],
    "generate": ["H", "--quiet"],
    "chat": ["--json"],
    "serve": ["--port", "0"],
    "eval": ["--reference", "x/y", "--text", "x"],
    "convert": ["out", "--bpw", "3"],
    "measure": ["-o", "m.json"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = scripted_folder(tmp_path_factory.mktemp("sizes") / "model", "Hi_you!")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def sizes(hub, files, tmp_path, monkeypatch):
    """A repository as `upload` makes it: a card on main, a model in each branch."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = hub.add(REPO)
    repository.commit("main", {"README.md": b"# Sizes\n", "measurement.json": b"{}"}, "card")
    for branch in ("2.5bpw", "3.0bpw"):
        repository.commit(branch, files, "weights")
    return repository


@pytest.mark.parametrize("verb", ["inspect", "tokenizer", "report", "generate"])
@pytest.mark.parametrize("how", [[f"{REPO}@3.0bpw"], [REPO, "--revision", "3.0bpw"]], ids=["at", "revision"])
def test_a_branch_is_taken_by_either_way(sizes, capsys, verb, how, files, tmp_path):
    model, *revision = how
    code, out, err = run(capsys, verb, model, *VERBS[verb], *revision)
    assert code == 0, err
    assert out
    assert (find_folder(f"{REPO}@3.0bpw", None) / "config.json").read_bytes() == files["config.json"]


@pytest.mark.parametrize("verb", VERBS)
def test_without_weights_on_main_the_branches_are_listed(sizes, capsys, verb):
    code, out, err = run(capsys, verb, REPO, *VERBS[verb])
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"dbrx-quant: error: {REPO}: holds no weights on its branch main; it has the branches 2.5bpw, "
        f"3.0bpw: give {REPO}@2.5bpw, or --revision 2.5bpw"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_branch_lists_those_that_there_are(sizes, capsys, verb):
    code, _, err = run(capsys, verb, f"{REPO}@4.0bpw", *VERBS[verb])
    assert code == 1
    assert (
        f"{REPO}@4.0bpw: the repository has no such branch, tag or commit; it has the branches 2.5bpw" in err
    )


def test_a_commit_is_a_revision_too(sizes):
    commit = sizes.history["3.0bpw"][0]
    assert find_folder(REPO, commit).name == commit


def test_a_folder_with_an_at_sign_is_a_folder_and_has_no_revision(tmp_path, capsys):
    folder = scripted_folder(tmp_path / "model@3.0bpw", "Hi")
    assert find_folder(folder, None) == folder
    assert run(capsys, "inspect", folder)[0] == 0
    code, _, err = run(capsys, "inspect", folder, "--revision", "main")
    assert code == 2
    assert "applies only to repositories" in err


def test_two_revisions_that_differ_are_refused():
    with pytest.raises(ValueError, match="names one revision"):
        find_folder(f"{REPO}@a", "b")


def test_what_is_no_repository_is_no_folder(capsys):
    for name in ("no/such/model@x", "a@b@c", "a b", "@x"):
        with pytest.raises(CheckpointError, match=r"no such folder$"):
            find_folder(name, None)


@pytest.mark.parametrize("verb", ["index", "tokenizer"])
def test_verbs_that_write_into_a_folder_ask_for_one(capsys, verb):
    code, _, err = run(capsys, verb, REPO)
    assert code == 1
    assert f"{REPO}: no such folder; {verb} writes into it" in err
    assert "hf download" in err
