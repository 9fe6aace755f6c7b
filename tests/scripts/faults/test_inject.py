"""Injected faults: the chosen call fails and no other, and real conversions survive one of each kind."""

import json
import os
import subprocess
import sys

import pytest
from places import TINY

from dbrx_quant.scripts.faults.faults import CALLS, DAMAGES, Fault, Reference, damage_a_file, draw_fault
from dbrx_quant.scripts.faults.inject import SHARES, build, kinds, main
from dbrx_quant.scripts.full_size.make_synthetic import main as make_synthetic

REFERENCE = Reference(2.0, dict.fromkeys(CALLS, 40), 1_000_000)
PROGRAM = """
import os, sys
for number in range(4):
    for folder in sys.argv[1:]:
        path = os.path.join(folder, str(number))
        try:
            with open(path, "wb", buffering=0) as file:
                print(os.path.basename(folder), number, file.write(b"0123456789"))
        except OSError as error:
            print(os.path.basename(folder), number, error.strerror)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


def outcomes(library, tmp_path, **environment):
    """What each write of a program came to, by folder and number."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    environment = {"LD_PRELOAD": str(library), "FAULTS_ROOT": str(inside), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, inside, outside],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return {tuple(line.split()[:2]): line.split(maxsplit=2)[2] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("environment", "failing"),
    [
        ({"FAULTS_OP": "write", "FAULTS_AT": "2", "FAULTS_ERRNO": "28"}, {"1": "No space left on device"}),
        (
            {"FAULTS_OP": "open", "FAULTS_AT": "3", "FAULTS_ERRNO": "24", "FAULTS_STAYS": "1"},
            {"2": "Too many open files", "3": "Too many open files"},
        ),
        ({"FAULTS_OP": "write", "FAULTS_AT": "4", "FAULTS_ERRNO": "0"}, {"3": "5"}),
        ({}, {}),
    ],
    ids=["once", "from then on", "half", "none"],
)
def test_the_chosen_call_fails_and_no_other(environment, failing, library, tmp_path):
    expected = {(folder, str(n)): "10" for folder in ("inside", "outside") for n in range(4)}
    expected |= {("inside", number): what for number, what in failing.items()}
    assert outcomes(library, tmp_path, **environment) == expected


def test_every_call_is_logged(library, tmp_path):
    outcomes(library, tmp_path, FAULTS_LOG=str(tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "ab" * 4


def test_the_same_seed_draws_the_same_fault():
    faults = [[draw_fault(kind, REFERENCE, seed) for kind in SHARES for seed in range(20)] for _ in range(2)]
    assert faults[0] == faults[1]
    assert len({str(fault) for fault in faults[0]}) > 80


def test_two_hundred_faults_are_of_every_kind_and_of_every_call():
    chosen = kinds(200)
    assert {kind: chosen.count(kind) for kind in SHARES} == {
        kind: 2 * share for kind, share in SHARES.items()
    }
    faults = [draw_fault(kind, REFERENCE, seed) for seed, kind in enumerate(chosen)]
    assert {f.environment["FAULTS_OP"] for f in faults if f.kind == "error"} == set(CALLS)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_another(damage, tmp_path):
    files = {name: os.urandom(5000) for name in "abc"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = damage_a_file(tmp_path, Fault("work", damage=damage, seed=3))
    assert not path.is_file() or path.read_bytes() != files[path.name]
    assert [n for n in files if n != path.name and (tmp_path / n).read_bytes() != files[n]] == []


@pytest.mark.slow
def test_conversions_survive_a_fault_of_each_kind(tmp_path):
    sizes = {"blocks": 1, "hidden": 128, "ffn": 64, "experts": 4, "active": 2, "heads": 2, "kv-heads": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    make_synthetic([str(tmp_path / "m"), *options, "--vocabulary=704", "--tokenizer", str(TINY)])
    command = [str(tmp_path / "m"), "--faults", "12", "--log", str(tmp_path / "log")]
    assert main([*command, "--bpw", "3.0", "--calibration", "offline", "--rows", "4", "--length", "32"]) == 0
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(verdicts) >= 10
    assert set(verdicts) <= {"sound", "refused"}
