"""What `eval` finds is kept in the folder, an entry for each text and windows."""

import json
import os

import pytest
import tiny_output

from dbrx_quant.quantize.output.side_files import copy_side_files
from dbrx_quant.runtime.evaluation.record import ppl_text, read_evaluations, save_evaluation
from dbrx_quant.runtime.files import json_file
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.folder.verify import verify
from dbrx_quant.scripts.cli.main import main

ENTRY = {
    "text": "wiki.txt",
    "windows": 40,
    "length": 512,
    "tokens": 20480,
    "ppl": 8.5,
    "ppl_original": 8.1,
    "kl": 0.031,
    "kl_stderr": 0.002,
    "top1": 0.93,
    "router_topk": None,
    "bpw": 3.0,
}


def test_an_entry_is_replaced_by_the_next_one_of_the_same_text_and_windows(tmp_path):
    assert read_evaluations(tmp_path) == []
    save_evaluation(tmp_path, ENTRY)
    save_evaluation(tmp_path, ENTRY | {"text": "code.py", "kl": 0.5, "kl_stderr": None})
    save_evaluation(tmp_path, ENTRY | {"windows": 8, "kl": 0.04})
    save_evaluation(tmp_path, ENTRY | {"kl": 0.03, "more": "is left out"})
    found = read_evaluations(tmp_path)
    keys = [(entry["text"], entry["windows"], entry["kl"]) for entry in found]
    assert keys == [("code.py", 40, 0.5), ("wiki.txt", 8, 0.04), ("wiki.txt", 40, 0.03)]
    assert found[2] == ENTRY | {"kl": 0.03}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a list of evaluations"),
        ("[]", "list, expected an object"),
        ('{"format_version": 2, "evaluations": []}', "version 2, this program reads 1"),
        ('{"format_version": 1, "evaluations": {}}', "evaluations is dict, expected a list"),
        ('{"format_version": 1, "evaluations": [1]}', r"evaluations\[0\] is int, expected an object"),
        (
            json.dumps({"format_version": 1, "evaluations": [ENTRY, ENTRY | {"kl": "low"}]}),
            r"evaluations\[1\] is invalid: kl is",
        ),
        (
            json.dumps({"format_version": 1, "evaluations": [ENTRY | {"ppl": float("nan")}]}),
            "NaN is not JSON",
        ),
        (json.dumps({"format_version": 1, "evaluations": [ENTRY | {"windows": 0}]}), "windows is 0"),
        (json.dumps({"format_version": 1, "evaluations": [{"text": "x"}]}), "without windows"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(content, message, tmp_path):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_evaluations(tmp_path)
    assert str(tmp_path / "evaluation.json") in str(error.value)


def test_an_entry_without_a_figure_is_refused(tmp_path):
    with pytest.raises(ValueError, match="top1 is None"):
        save_evaluation(tmp_path, ENTRY | {"top1": None})


def test_a_perplexity_that_no_number_holds_is_kept_as_null_and_told(tmp_path):
    save_evaluation(tmp_path, ENTRY | {"ppl": None})
    assert read_evaluations(tmp_path)[0]["ppl"] is None
    assert [ppl_text(value) for value in (None, 13.35649, 1e300)] == ["> 1e308", "13.356", "1e+300"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    tiny_output.make_output(folder)
    (folder / "text.txt").write_text("The quick brown fox, 1234 times. " * 20)
    return folder


@pytest.fixture
def evaluate(made, capsys):
    (made / "out" / "evaluation.json").unlink(missing_ok=True)

    def run(*more, windows=2, folder=None):
        arguments = ["eval", folder or made / "out", "--reference", made / "source"]
        arguments += ["--text", made / "text.txt", "--windows", windows, "--length", 16, "--json", "--quiet"]
        code = main(list(map(str, [*arguments, *more])))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_eval_keeps_what_it_printed(made, evaluate):
    code, out, err = evaluate()
    assert (code, err) == (0, "")
    assert evaluate(windows=1)[0] == 0
    assert evaluate()[0] == 0
    printed = json.loads(out)
    single, double = read_evaluations(made / "out")
    assert (single["windows"], single["kl_stderr"]) == (1, None)
    assert (double["text"], double["tokens"], double["length"]) == ("text.txt", 32, 16)
    assert double["ppl_original"] == pytest.approx(printed["reference_ppl"])
    for name in ("ppl", "kl", "kl_stderr", "top1", "router_topk", "bpw"):
        assert double[name] == pytest.approx(printed[name]), name


def test_eval_leaves_the_file_when_told_to(made, evaluate):
    assert evaluate("--no-save")[0] == 0
    assert not (made / "out" / "evaluation.json").exists()


def test_eval_says_so_where_the_folder_cannot_be_written(made, evaluate, monkeypatch):
    def refuse(path, value):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(json_file, "write_json", refuse)
    code, out, err = evaluate()
    assert code == 0
    assert json.loads(out)["kl"] > 0
    assert err == f"not saved: {made / 'out' / 'evaluation.json'}: Permission denied\n"


def test_eval_writes_nothing_into_the_hubs_cache(made, evaluate, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made))
    code, _, err = evaluate()
    assert (code, len(err.splitlines())) == (0, 1)
    assert "not saved" in err
    assert not (made / "out" / "evaluation.json").exists()


def test_eval_finds_a_damaged_file_before_it_works(made, evaluate):
    (made / "out" / "evaluation.json").write_text("{")
    code, out, err = evaluate()
    assert (code, out) == (1, "")
    assert "evaluation.json: not a list of evaluations" in err


def test_a_folder_with_evaluations_verifies_and_is_converted_without_them(made, tmp_path):
    (made / "out" / "evaluation.json").unlink(missing_ok=True)
    save_evaluation(made / "out", ENTRY | {"bpw": verify(made / "out").facts["bpw"]})
    assert verify(made / "out").ok
    copied = copy_side_files(made / "out", tmp_path)
    assert copied.skipped["evaluation.json"] == "written anew"
