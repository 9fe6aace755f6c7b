"""Damaged files and odd arguments through the verbs: one line that says why, never a traceback.

The long run is `pytest -m slow tests/scripts/cli/test_fuzz.py`; DBRXQ_FUZZ is the number of its cases.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys

import pytest
from tiny_output import make_output
from upload_runs import measured_of, strategy_of

from dbrx_quant.quantize import conversion
from dbrx_quant.quantize.measurement import write_measurement
from dbrx_quant.scripts.cli.main import main

CODES = (0, 1, 2, 3)  # 70 is a fault of the program
JSON_FILES = (
    "checksums.json",
    "config.json",
    "conversion.json",
    "evaluation.json",
    "generation_config.json",
    "measurement.json",
    "strategy.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 10**30, 1e308, -1.5, float("inf"), float("nan")),
    *("", "x", "\ud83d", "\x1b[2J\x07", "../../x", "{% for", "9" * 50),
    *([], {}, [None], [[]], ["x"], [1, 2], {"x": 1}, {"": None}),
)
TEXTS = (
    '{"text": "a b c d e f g h"}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    '{"prompt": "a", "completion": "b"}',
    '{"instruction": "a", "input": "b", "output": "c"}',
)
WORDS = (
    "",
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "1e400",
    "9" * 30,
    "x",
    "\udcff",
    "\x1b[2J",
    "../..",
    "1,2",
    "²",
    "3.0",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A quantized folder with every side file, and its source."""
    folder = tmp_path_factory.mktemp("fuzz")
    out = make_output(folder)
    write_measurement(out / "measurement.json", measured_of(out))
    scores = {"kl": 0.1, "kl_stderr": 0.01, "ppl": 3.0, "reference_ppl": 2.9, "top1": 0.9, "positions": 64}
    strategy = {**strategy_of(out), "held_out": None, "measured": scores}
    entry = {
        **{"text": "a", "windows": 1, "length": 8, "tokens": 8, "ppl": 2.0, "ppl_original": 1.9},
        **{"kl": 0.1, "kl_stderr": None, "top1": 0.9, "router_topk": None, "bpw": 3.3},
    }
    for name, content in (
        ("strategy.json", strategy),
        ("evaluation.json", {"format_version": 1, "evaluations": [entry]}),
        (
            "conversion.json",
            {
                "format_version": 1,
                "command": "dbrx-quant convert a b",
                "settings": {"model": "a"},
                "versions": {"torch": "2"},
                "relative_errors": {"lm_head": 0.1},
            },
        ),
    ):
        (out / name).write_text(json.dumps(content))
    return folder


def places(value, found=()):
    """The paths to everything in a JSON value."""
    yield found
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*found, key))


def mutate_json(text, dice):
    """A JSON text with one place changed, or broken as text."""
    content = json.loads(text)
    path = dice.choice([place for place in places(content) if len(place) < 6])
    kind = dice.random()
    if not path or kind < 0.15:
        return dice.choice(
            ["", "[" * 20_000, text[: dice.randrange(len(text))], "null", "[]", "1", '{"a": 1e999}']
        )
    at = content
    for key in path[:-1]:
        at = at[key]
    if kind < 0.25 and isinstance(at, dict):
        del at[path[-1]]
    else:
        at[path[-1]] = dice.choice(VALUES)
    return json.dumps(content)


def mutate_bytes(content, dice):
    """Bytes with some changed, in the first thousand more often than not, or cut off."""
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 3))):
        changed[dice.randrange(min(len(changed), dice.choice((1000, len(changed)))))] = dice.randrange(256)
    return bytes(changed[: dice.choice((len(changed), dice.randrange(len(changed))))])


def damage(folder, dice):
    """Damage one file of a folder; returns what was done."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    name = dice.choice([*(known for known in JSON_FILES if known in names), *names])
    path = folder / name
    kind = dice.random()
    if kind < 0.05:
        path.unlink()
        return f"{name} missing"
    if name.endswith(".json") and kind < 0.85:
        path.write_bytes(mutate_json(path.read_text(), dice).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), dice))
    return name


def command(folders, work, dice):
    """(what is special about it, a command line)."""
    out, source, verb = work / "out", work / "source", dice.random()
    if verb < 0.15:
        lines = [mutate_json(dice.choice(TEXTS), dice) for _ in range(3)]
        suffix = dice.choice((".jsonl", ".json", ".txt", ".jsonl.gz", ".parquet"))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        (work / f"text{suffix}").write_bytes(content if dice.random() < 0.7 else mutate_bytes(content, dice))
        text = ["--calibration", work / f"text{suffix}", "--rows", "2", "--length", dice.choice(("1", "8"))]
        return f"text {lines}", ["measure", folders / "source", "-o", work / "m.json", *text]
    if verb < 0.3:
        option, *rest = dice.choice(
            (
                ("--max-new-tokens", "generate", folders / "out", "x"),
                ("--temperature", "generate", folders / "out", "x", "--max-new-tokens", "2"),
                ("--seed", "generate", folders / "out", "x", "--max-new-tokens", "2"),
                ("--device", "generate", folders / "out", "x", "--max-new-tokens", "2"),
                ("--bpw", "convert", folders / "source", work / "o", "--dry-run"),
                ("--size", "convert", folders / "source", work / "o", "--dry-run"),
                ("--vram", "convert", folders / "source", work / "o", "--dry-run"),
                ("--rows", "convert", folders / "source", work / "o", "--dry-run", "--bpw", "4"),
                ("--length", "convert", folders / "source", work / "o", "--dry-run", "--bpw", "4"),
                ("--calibration", "measure", folders / "source", "-o", work / "m.json"),
                ("--port", "serve", "no/such/folder"),
            )
        )
        return "argument", [
            *rest,
            option,
            dice.choice([w for w in WORDS if (option, w) != ("--max-new-tokens", "9" * 30)]),
        ]
    if verb < 0.4:
        done = damage(source, dice)
        return f"source: {done}", ["convert", source, work / "o", "--bpw", "4", "--dry-run"]
    done = damage(out, dice)
    return f"out: {done}", dice.choice(
        (
            ["inspect", out, "--json"],
            ["verify", out, "--quiet"],
            ["tokenizer", out, "--check"],
            ["tokenizer", out, "--dry-run"],
            ["report", out, "--json", "-o", work / "page.html"],
            [
                "generate",
                out,
                "x",
                "--max-new-tokens",
                "1",
                "--quiet",
                *dice.choice(([], ["--chat"], ["--json"])),
            ],
            ["index", out],
        )
    )


def run_case(folders, work, seed):
    """What is wrong with how the command deals with one case, or None."""
    dice = random.Random(seed)
    for name in ("out", "source"):
        shutil.copytree(folders / name, work / name)
    what, arguments = command(folders, work, dice)
    words = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue()
    if code not in CODES or "Traceback" in said or "\x1b" in said:
        return f"{seed}: {what}: {' '.join(words)}: {code}: {said[-600:]}"
    if "--json" in words and code == 0:
        json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(f"{seed}: {name} in JSON"))
    return None


@pytest.fixture
def no_work(monkeypatch):
    """Measuring ends where it would begin."""

    def stop(*_):
        raise ValueError("stopped")

    monkeypatch.setattr(conversion, "_measurement", stop)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def run_cases(folders, tmp_path, seeds):
    faults = []
    for seed in seeds:
        work = tmp_path / str(seed)
        if fault := run_case(folders, work, seed):
            faults.append(fault)
        shutil.rmtree(work)
    assert not faults, "\n".join(faults)


@pytest.mark.usefixtures("no_work", "one_thread")
def test_damaged_files_and_odd_arguments_end_in_one_line(folders, tmp_path):
    run_cases(folders, tmp_path, range(60))


@pytest.mark.slow
@pytest.mark.usefixtures("no_work", "one_thread")
def test_thousands_of_damaged_files_and_odd_arguments_end_in_one_line(folders, tmp_path):
    run_cases(folders, tmp_path, range(1000, 1000 + int(os.environ.get("DBRXQ_FUZZ", "3000"))))
