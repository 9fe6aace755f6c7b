"""Tasks of lm-eval on a small quantized model: scores, records, and errors that say what to do."""

import json
import math

import pytest
import tiny_output
import torch
import yaml

from dbrx_quant.runtime.evaluation import tasks as running
from dbrx_quant.runtime.evaluation.record import read_evaluations, read_task_scores
from dbrx_quant.runtime.evaluation.tasks import TaskSettings, open_tasks
from dbrx_quant.runtime.model.load import load_model
from dbrx_quant.runtime.tokenizer.load import load_tokenizer
from dbrx_quant.scripts.cli.main import main

QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": [f" {a + b}", f" {a * b + 1}", " a fox"], "answer": a % 3}
    for a, b in ((1, 2), (2, 2), (3, 1), (4, 4), (5, 2), (2, 7))
]
CHOICE = {
    "task": "sums",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 2.0},
}
GENERATION = CHOICE | {
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
del GENERATION["doc_to_choice"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, an output of it, and a folder of tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_output.make_output(folder)
    (folder / "text.txt").write_text("The quick brown fox, 1234 times. " * 20)
    own = folder / "own"
    own.mkdir()
    (own / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    data = {"dataset_kwargs": {"data_files": {"test": str(own / "sums.jsonl")}}}
    for task in (CHOICE, GENERATION):
        (own / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | data))
    lost = CHOICE | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(own / "gone.jsonl")}}}
    (own / "lost.yaml").write_text(yaml.safe_dump(lost))
    (own / "group.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["sums", "written"]}))
    return folder


@pytest.fixture
def evaluate(made, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (made / "out" / "evaluation.json").unlink(missing_ok=True)

    def run(*more):
        code = main(list(map(str, ["eval", made / "out", "--tasks-path", made / "own", *more])))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_without_lm_eval_it_is_said_what_to_install(evaluate, monkeypatch):
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    code, out, err = evaluate("--tasks", "sums")
    assert (code, out) == (1, "")
    assert err == "dbrx-quant: error: --tasks needs lm-eval: pip install 'dbrx-quant[tasks]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --text FILE, --tasks NAMES, or both"),
        (("--text", "x"), "no original to compare with"),
        (("--reference", "x"), "nothing to evaluate on"),
    ],
)
def test_what_does_not_go_together_is_bad_usage(evaluate, arguments, message):
    code, out, err = evaluate(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_names_are_given_once(evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate("--tasks", "a,,b")
    assert "expected names, each once" in capsys.readouterr().err


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="tasks: pip install 'dbrx-quant[tasks]'")


def accuracy(made):
    """Of a plain reading of multiple choice: the choice whose tokens are the likeliest."""
    model, tokenizer = load_model(made / "out"), load_tokenizer(made / "out")

    def likelihood(context, choice):
        whole = tokenizer(context + choice)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logs[at - 1, whole[at]]) for at in range(start, len(whole)))

    right = 0
    for one in QUESTIONS:
        found = [likelihood(one["question"], choice) for choice in one["choices"]]
        right += found.index(max(found)) == one["answer"]
    return right / len(QUESTIONS)


@pytest.mark.usefixtures("harness")
def test_multiple_choice_and_generation_are_scored_and_kept(made, evaluate):
    code, out, err = evaluate("--tasks", "sums,written", "--reference", made / "source", "--json", "--quiet")
    assert (code, err) == (0, "")
    sums, written = json.loads(out)["tasks"]
    assert (sums["task"], sums["metric"], sums["samples"], sums["fewshot"]) == ("sums", "acc", 6, 0)
    assert sums["value"] == pytest.approx(accuracy(made))
    assert (sums["version"], sums["higher_is_better"], sums["seed"]) == ("2.0", True, 1234)
    assert sums["versions"].keys() == {"lm_eval", "transformers", "torch"}
    assert (written["task"], written["metric"]) == ("written", "exact_match")
    assert all(entry["value_original"] is not None for entry in (sums, written))
    assert read_task_scores(made / "out") == [sums, written]
    assert read_evaluations(made / "out") == []


@pytest.mark.usefixtures("harness")
def test_settings_reach_the_tasks_and_tell_entries_apart(made, evaluate):
    options = ("--tasks", "sums", "--limit", 4, "--json", "--quiet")
    assert evaluate(*options)[0] == 0
    assert evaluate(*options)[0] == 0
    code, out, _ = evaluate(*options, "--fewshot", 2, "--seed", 5)
    assert code == 0
    entry = json.loads(out)["tasks"][0]
    assert (entry["fewshot"], entry["samples"], entry["limit"], entry["seed"]) == (2, 4, 4, 5)
    assert entry["value_original"] is None
    assert [(kept["fewshot"], kept["seed"]) for kept in read_task_scores(made / "out")] == [(0, 1234), (2, 5)]


@pytest.mark.slow
@pytest.mark.usefixtures("harness")
def test_a_text_and_a_group_of_tasks_in_one_run_make_two_tables(made, evaluate):
    code, out, _ = evaluate(
        *("--tasks", "both", "--limit", 2, "--quiet", "--reference", made / "source"),
        *("--text", made / "text.txt", "--windows", 2, "--length", 16),
    )
    assert code == 0
    assert "KL divergence" in out
    assert "exact_match" in out
    assert "lm_eval" in out
    assert {entry["task"] for entry in read_task_scores(made / "out")} >= {"sums", "written"}
    assert math.isfinite(read_evaluations(made / "out")[0]["kl"])


@pytest.mark.usefixtures("harness")
def test_an_original_that_does_not_fit_is_left_out_and_that_is_said(made, evaluate, monkeypatch):
    monkeypatch.setattr("dbrx_quant.runtime.kernels.device.available_memory", lambda: 1000)
    options = ("--tasks", "sums", "--limit", 1, "--json", "--quiet", "--reference", made / "source")
    code, out, err = evaluate(*options)
    assert code == 0
    assert "tasks without the original: it takes" in err
    assert json.loads(out)["tasks"][0]["value_original"] is None


@pytest.mark.usefixtures("harness")
def test_tasks_that_are_not_there_or_lack_their_data_say_what_to_do(made, evaluate):
    with pytest.raises(ValueError, match=r"no such folder; --tasks-path names one"):
        open_tasks(TaskSettings(("sums",), made / "nowhere"))
    code, _, err = evaluate("--tasks", "lost", "--quiet")
    assert code == 1
    line = err.splitlines()[-1]
    assert "task lost: cannot be loaded" in line
    assert "gone.jsonl" in line
    assert "--tasks-path" in line


@pytest.mark.slow  # lm-eval's own list takes 10 seconds to read
@pytest.mark.usefixtures("harness")
def test_an_unknown_task_is_told_with_its_neighbours(made, evaluate):
    code, _, err = evaluate("--tasks", "helaswag", "--quiet")
    assert code == 1
    assert "no task 'helaswag' in lm-eval" in err
    assert "did you mean" in err
    assert "hellaswag" in err
