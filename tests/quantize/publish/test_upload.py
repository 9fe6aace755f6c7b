"""Uploads over real HTTP to a Hub on this machine: what lands there, and what is refused before."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from os import environ

import hub_server
import pytest
from hub_server import TOKEN
from places import TINY
from upload_runs import BASE, CARD, REPO, measured_of, retarget, sent, write_json

from dbrx_quant.quantize.measurement import write_measurement
from dbrx_quant.quantize.publish import upload as publishing
from dbrx_quant.scripts.cli.main import main

pytest_plugins = ["upload_fixtures"]


def test_each_folder_becomes_a_branch_with_its_files_and_main_has_card_measurement_and_terms(
    made, hub, upload
):
    code, output, _ = upload(made)
    assert code == 0
    assert hub.endpoint in output
    repo = hub.repos[REPO]
    assert sorted(repo.history) == ["3.0bpw", "4.0bpw", "main"]
    for bits in ("3.0", "4.0"):
        files = repo.files(f"{bits}bpw")
        folder = made / f"{bits}bpw"
        here = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
        assert set(files) == here | {".gitattributes"}
        assert all(files[name] == (folder / name).read_bytes() for name in here - {"README.md"})
        assert f"{bits}bpw" in files["README.md"].decode()
        assert len(repo.history[f"{bits}bpw"]) == 2, "the files and the card are one commit"
    main_files = repo.files("main")
    expected = {"LICENSE.txt", "NOTICE.txt", "README.md", "measurement.json", "error-vs-size.png"}
    assert set(main_files) == expected | {".gitattributes"}
    card = main_files["README.md"].decode()
    assert "/tree/3.0bpw" in card
    assert "/tree/4.0bpw" in card


def test_a_gated_originals_quant_is_gated_before_the_first_file_is_there(made, hub, upload):
    assert upload(made)[0] == 0
    assert hub.repos[REPO].gated == "auto"
    settings = next(i for i, (method, path) in enumerate(hub.requests) if path.endswith("/settings"))
    first_commit = next(i for i, (method, path) in enumerate(hub.requests) if "/commit/" in path)
    assert settings < first_commit


def test_running_again_sends_nothing_and_a_changed_file_alone_is_sent(both, hub, upload):
    assert upload(both)[0] == 0
    before = {branch: list(commits) for branch, commits in hub.repos[REPO].history.items()}
    code, output, _ = upload(both, "--json")
    assert code == 0
    assert sent(output) == {"3.0bpw": [], "4.0bpw": [], "main": []}
    assert hub.repos[REPO].history == before
    puts = hub.asked("PUT", "/lfs/")
    (both / "3.0bpw" / "NOTES.md").write_text("new\n", encoding="utf-8")
    assert sent(upload(both, "--json")[1]) == {"3.0bpw": ["NOTES.md"], "4.0bpw": [], "main": []}
    assert hub.asked("PUT", "/lfs/") == puts


def test_shards_of_an_earlier_upload_are_removed_but_other_files_stay(both, hub, upload):
    assert upload(both / "3.0bpw")[0] == 0
    repo = hub.repos[REPO]
    files = {**repo.files("3.0bpw"), "model-00099-of-00099.safetensors": b"old", "photo.jpg": b"mine"}
    repo.commit("3.0bpw", files, "by hand")
    code, output, _ = upload(both / "3.0bpw", "--json")
    assert code == 0
    assert json.loads(output)["branches"][0]["removed"] == ["model-00099-of-00099.safetensors"]
    assert "photo.jpg" in repo.files("3.0bpw")
    assert "model-00099-of-00099.safetensors" not in repo.files("3.0bpw")


def test_a_size_that_is_added_later_joins_the_others_in_the_table(made, hub, upload):
    assert upload(made / "3.0bpw")[0] == 0
    assert "/tree/4.0bpw" not in hub.repos[REPO].files("main")["README.md"].decode()
    assert upload(made / "4.0bpw")[0] == 0
    card = hub.repos[REPO].files("main")["README.md"].decode()
    assert card.index("/tree/3.0bpw") < card.index("/tree/4.0bpw")
    assert "0.04000 (predicted)" in card
    assert "0.03000 (predicted)" in card
    assert "measurement.json" not in hub.repos[REPO].files("main")["README.md"].decode().split("---")[1]
    assert sorted(hub.repos[REPO].files("4.0bpw")) == sorted({*hub.repos[REPO].files("3.0bpw")}), (
        "the new branch has nothing of main's"
    )


def test_what_people_write_below_our_card_stays(both, hub, upload):
    assert upload(both / "3.0bpw")[0] == 0
    repo = hub.repos[REPO]
    files = dict(repo.files("main"))
    repo.commit("main", {**files, "README.md": files["README.md"] + b"\nMy own remark.\n"}, "by hand")
    assert upload(both)[0] == 0
    card = repo.files("main")["README.md"].decode()
    assert card.rstrip().endswith("My own remark.")
    assert "/tree/4.0bpw" in card
    assert sent(upload(both, "--json")[1])["main"] == []


def test_a_card_that_somebody_else_wrote_is_not_written_over_unasked(made, hub, upload):
    repo = hub.add(REPO)
    repo.commit("main", {**repo.files("main"), "README.md": b"# Mine\n"}, "by hand")
    code, _, error = upload(made)
    assert code == 1
    assert "--replace-card" in error
    assert repo.files("main")["README.md"] == b"# Mine\n"
    assert hub.asked("POST", "/(commit|branch|preupload)/") == 0
    assert upload(made, "--replace-card")[0] == 0
    assert b"EXL2" in repo.files("main")["README.md"]


def test_a_repository_of_another_model_is_left_alone(made, hub, upload):
    assert upload(made)[0] == 0
    hub.requests.clear()
    card = hub.repos[REPO].files("main")["README.md"].decode().replace(BASE, "mistralai/Mixtral")
    hub.repos[REPO].commit("main", {**hub.repos[REPO].files("main"), "README.md": card.encode()}, "other")
    code, _, error = upload(made)
    assert code == 1
    assert "holds quantizations of mistralai/Mixtral" in error
    assert hub.asked("POST", "/commit/") == 0


def test_private_makes_a_private_repository_and_does_not_pretend_for_a_public_one(made, hub, upload):
    assert upload(made / "3.0bpw", "--private")[0] == 0
    assert hub.repos[REPO].private
    assert upload(made / "3.0bpw", "--private")[0] == 0
    hub.repos[REPO].private = False
    code, _, error = upload(made / "3.0bpw", "--private")
    assert code == 1
    assert "already exists and is public" in error


def test_revision_names_the_branch_of_one_folder(made, hub, upload):
    assert upload(made / "3.0bpw", "--revision", "best")[0] == 0
    assert sorted(hub.repos[REPO].history) == ["best", "main"]
    assert upload(made, "--revision", "best")[0] == 2
    assert upload(made / "4.0bpw", "--revision", "main")[0] == 0
    files = hub.repos[REPO].files("main")
    assert "model.safetensors.index.json" in files
    assert "/tree/best" in files["README.md"].decode()
    assert upload(made / "3.0bpw")[0] == 0, "weights on main stay where only a branch is uploaded"
    assert "model.safetensors.index.json" in hub.repos[REPO].files("main")


def test_a_folder_that_does_not_verify_is_not_published(both, hub, upload):
    shard = sorted((both / "4.0bpw").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, output, error = upload(both)
    assert code == 3
    assert f"4.0bpw: {shard.name}: its SHA-256 differs" in output
    assert "nothing was uploaded" in error
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: (d / "README.md").unlink(), "licence is unknown"),
        (lambda d: (d / "README.md").write_text("# no front matter\n"), "licence is unknown"),
        (lambda d: (d / "README.md").write_text("---\nlicense: [\n---\n"), "front matter is not YAML"),
        (lambda d: (d / "LICENSE.txt").unlink(), "no LICENSE file"),
        (lambda d: (d / "NOTICE.txt").unlink(), "NOTICE"),
        (
            lambda d: (d / "README.md").write_text("---\nlicense: other\nlicense_link: TERMS\n---\n"),
            "not there: TERMS",
        ),
        (lambda d: write_json(d / "config.json", {"model_type": "dbrx"}), "quant_method exl2"),
        (
            lambda d: write_json(d / "evaluation.json", evaluation(bpw=2.5)),
            "evaluated at 2.5000 bits per weight",
        ),
    ],
)
def test_what_may_or_can_not_be_published_is_refused_before_anything_is_sent(
    both, hub, upload, change, complaint
):
    change(both / "3.0bpw")
    for options in ([], ["--dry-run"]):
        code, _, error = upload(both / "3.0bpw", *options)
        assert code == 1
        assert complaint in error
    assert hub.requests == []


def evaluation(**changes):
    entry = {"text": "wiki.txt", "windows": 8, "length": 64, "tokens": 504, "ppl": 9.5, "ppl_original": 9.1}
    scores = {"kl": 0.04, "kl_stderr": 0.003, "top1": 0.91, "router_topk": 0.95}
    return {"format_version": 1, "evaluations": [{**entry, **scores, **changes}]}


def test_terms_that_the_original_has_on_the_hub_and_the_folder_lacks_are_noticed(both, hub, upload):
    original = hub.add(BASE, gated="auto")
    stricter = CARD.replace("Use is governed", "Commercial use is forbidden; it is governed")
    original.commit("main", {"README.md": stricter.encode()}, "card")
    code, _, error = upload(both)
    assert code == 1
    assert "other terms" in error
    assert "extra_gated_prompt" in error
    assert REPO not in hub.repos
    original.commit("main", {"README.md": CARD.encode()}, "card")
    assert upload(both)[0] == 0


def test_a_file_that_holds_the_token_stays_here(both, hub, upload):
    (both / "4.0bpw" / "notes.txt").write_text(f"HF_TOKEN={TOKEN}\n", encoding="utf-8")
    code, _, error = upload(both)
    assert code == 1
    assert "notes.txt: contains your token" in error
    assert hub.requests == []


def test_what_may_surprise_is_told_before_anything_is_sent(both, hub, upload, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    folder = both / "3.0bpw"
    (folder / "figures").mkdir()
    (folder / "notes.txt").write_text("from /home/someone/private/texts\n", encoding="utf-8")
    write_measurement(folder / "measurement.json", replace(measured_of(folder), tokens=1))
    code, _, error = upload(both)
    assert code == 0
    assert "folders in it are not uploaded: figures" in error
    assert "reveals paths below /home/someone/: notes.txt" in error
    assert "measurement.json differ" in error
    assert "measurement.json" not in hub.repos[REPO].files("main")
    assert "measurement.json" in hub.repos[REPO].files("4.0bpw")


def test_a_gate_of_the_original_that_its_card_does_not_mention_is_taken_over(both, hub, upload):
    for folder in both.iterdir():
        (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    hub.add(BASE, gated="manual")
    assert upload(both)[0] == 0
    assert hub.repos[REPO].gated == "auto"


def test_folders_of_different_models_do_not_go_to_one_repository(both, hub, upload):
    (both / "4.0bpw" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    code, _, error = upload(both)
    assert code == 1
    assert "differ in their terms" in error
    retarget(both / "4.0bpw", 3.0)
    code, _, error = upload(both)
    assert code == 1
    assert "would both become the branch 3.0bpw" in error
    code, _, error = upload(both / "3.0bpw", both / "3.0bpw")
    assert code == 1
    assert "given twice" in error


def test_the_original_must_be_known_and_a_downloaded_quant_knows_it(both, hub, capsys):
    arguments = ["upload", str(both / "3.0bpw"), REPO, "--quiet"]
    assert main(arguments) == 1
    assert "--base-model ORG/NAME" in capsys.readouterr().err
    record = {"format_version": 1, "command": "dbrx-quant convert", "versions": {}, "relative_errors": {}}
    settings = {"bpw": 3.0, "head_bits": 6}
    write_json(both / "3.0bpw" / "conversion.json", {**record, "settings": {"model": BASE, **settings}})
    assert main(arguments) == 0
    card = hub.repos[REPO].files("3.0bpw")["README.md"]
    assert f"base_model: {BASE}\n" in card.decode()
    write_json(both / "3.0bpw" / "conversion.json", {**record, "settings": {"model": "tiny", **settings}})
    (both / "3.0bpw" / "README.md").write_bytes(card)  # as a download leaves it
    assert main([*arguments, "--json"]) == 0
    again = hub.repos[REPO].files("3.0bpw")["README.md"]
    assert again == card


def test_dry_run_shows_files_card_and_branches_and_asks_nobody(made, hub, upload):
    code, output, _ = upload(made, "--dry-run")
    assert code == 0
    assert hub.requests == []
    for path in (made / "3.0bpw").iterdir():
        assert (path.name in output) == (not path.name.startswith("."))
    for branch in ("3.0bpw", "4.0bpw", "main"):
        assert f"branch {branch}: " in output
        assert f"README.md of {branch}" in output
    code, output, _ = upload(made, "--dry-run", "--json")
    facts = json.loads(output)
    assert facts["gated"] is True
    assert [branch["branch"] for branch in facts["branches"]] == ["3.0bpw", "4.0bpw", "main"]
    assert upload(made)[0] == 0
    for branch in facts["branches"]:
        files = hub.repos[REPO].files(branch["branch"])
        assert {name for name, _, _ in branch["files"]} == set(files) - {".gitattributes"}
        assert branch["card"].encode() == files["README.md"]


def test_the_card_has_a_picture_where_matplotlib_is_and_says_so_where_it_is_not(made, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = ["upload", str(made), REPO, "--base-model", BASE, "--dry-run", "--json", "--quiet"]
    assert main(command) == 0
    branch = json.loads(capsys.readouterr().out)["branches"][-1]
    sizes = {path: size for path, size, _ in branch["files"]}
    assert sizes["error-vs-size.png"] > 10_000
    assert "](error-vs-size.png)" in branch["card"]

    def missing(*_, **__):
        raise ImportError("pictures need matplotlib")

    monkeypatch.setattr(publishing, "error_curve_png", missing)
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "no picture in the card: pictures need matplotlib" in shown.err
    assert "error-vs-size.png" not in shown.out


def test_a_folder_in_place_of_the_repository_is_a_usage_error(both, capsys, monkeypatch):
    monkeypatch.chdir(both.parent)
    assert main(["upload", str(both / "3.0bpw"), "both/3.0bpw"]) == 2
    assert "NAMESPACE/NAME" in capsys.readouterr().err
    assert main(["upload", str(both / "3.0bpw"), "name-alone"]) == 2


RUN = """
import re
import sys

import torch
from huggingface_hub import hf_hub_download

from dbrx_quant.runtime import load_model
from dbrx_quant.scripts.cli.main import main

folder = sys.argv[1]
assert main(["upload", folder, "me/tiny-exl2", "--base-model", "databricks/tiny", "--quiet"]) == 0
card = open(hf_hub_download("me/tiny-exl2", "README.md", revision="3.0bpw")).read()
snippets = re.findall("```python\\n(.*?)```", card, re.DOTALL)
shown = {}
exec(snippets[0].replace("max_new_tokens=200", "max_new_tokens=8"), shown)  # as a visitor would
theirs = shown["model"]
exec(snippets[1].replace("revision=branch", "revision=branch, dtype='float32'"), shown)
through = shown["model"]
ours = load_model(folder + "/3.0bpw")
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    logits = [model(ids).logits for model in (ours, theirs, through)]
assert theirs is not through
assert torch.isfinite(logits[0]).all() and logits[0].std() > 0
assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
text = [model.generate(ids[:1], max_new_tokens=8, do_sample=False) for model in (ours, theirs)]
assert torch.equal(*text)
"""


def run_and_load(folder, home):
    """Upload and load again in a process that knows the Hub by its environment; gives the repository."""
    with hub_server.serve() as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder)],
            env={**environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not re.search("random|MISSING|newly initialized", done.stderr)
    return hub.repos[REPO]


def test_what_landed_is_loaded_by_id_and_revision_and_gives_the_same_logits(made, tmp_path):
    run_and_load(made, tmp_path / "home")


@pytest.mark.slow
def test_a_conversion_that_was_evaluated_is_published_with_its_figures_and_loads(tmp_path):
    tiny = TINY
    source, out = shutil.copytree(tiny, tmp_path / "source"), tmp_path / "out"
    for name, text in (("README.md", CARD), ("LICENSE", "licence"), ("NOTICE", "notice")):
        (source / name).write_text(text, encoding="utf-8")
    options = ["--calibration", "offline", "--rows", "16", "--length", "128", "--effort", "fast", "--quiet"]
    assert main(["convert", str(source), str(out), "--bpw", "3.0,4.0", *options]) == 0
    options = ["--text", str(tiny / "heldout.txt"), "--windows", "4", "--length", "128", "--quiet"]
    for bits in ("3.0", "4.0"):
        assert main(["eval", str(out / f"{bits}bpw"), "--reference", str(source), *options]) == 0
    repo = run_and_load(out, tmp_path / "home")
    card = repo.files("main")["README.md"].decode()
    assert "on `heldout.txt`, 4 windows of 128 tokens" in card
    for bits in ("3.0", "4.0"):
        folder = out / f"{bits}bpw"
        scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["evaluations"][0]
        assert f"| {scores['ppl']:.3f} | {scores['kl']:.5f} ± {scores['kl_stderr']:.5f} |" in card
        files = repo.files(f"{bits}bpw")
        assert all(files[path.name] == path.read_bytes() for path in folder.glob("*.safetensors"))
