"""For which GPUs a build makes code (csrc/cuda_targets.cmake), on machines imitated by two programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import CSRC

CUDA_13 = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
CUDA_12_4 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
SCRIPT = """
cmake_minimum_required(VERSION 3.20)
include("{rules}")
dbrxq_cuda_targets(targets)
message("${{targets}} ${{DBRXQ_CUDA_DRAFT}}")
"""


def cmake():
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else shutil.which("cmake")


pytestmark = pytest.mark.skipif(cmake() is None, reason="no cmake; pip install cmake")


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """What a machine would build for."""

    def program(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def find(gpus=None, known=CUDA_13, given="", state=""):
        nvcc = program("nvcc", "\n".join(f"echo compute_{arch}" for arch in known))
        program("nvidia-smi", "exit 9" if gpus is None else "\n".join(f"echo {gpu}" for gpu in gpus))
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        script = tmp_path / "script.cmake"
        script.write_text(SCRIPT.format(rules=CSRC / "cuda_targets.cmake"), encoding="utf-8")
        settings = {"CMAKE_CUDA_COMPILER": nvcc, "DBRXQ_CUDA_ARCHITECTURES": given, "SKBUILD_STATE": state}
        defined = [f"-D{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [cmake(), *defined, "-P", script], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stderr.strip()

    return find


def test_the_gpus_of_the_machine_are_built_for(targets):
    assert targets(["8.6", "9.0", "8.6"]) == "86;90"
    assert targets(["12.0"], state="wheel") == "120"


def test_a_wheel_made_without_a_gpu_is_for_every_generation_the_compiler_knows(targets):
    assert targets(state="wheel") == "75-real;80-real;86-real;89-real;90-real;100-real;120"
    assert targets(state="wheel", known=CUDA_12_4) == "75-real;80-real;86-real;89-real;90"


def test_an_editable_build_without_a_gpu_compiles_once(targets):
    assert targets(state="editable") == targets() == "80 ON"  # a draft


def test_what_is_given_counts_more_than_what_is_there(targets):
    assert targets(["8.6"], given="80;90") == "80;90"
    assert targets(["8.6"], given="all", known=CUDA_12_4) == "75-real;80-real;86-real;89-real;90"


def test_gpus_that_are_too_old_or_too_new_do_not_count(targets):
    assert targets(["6.1", "8.9"]) == "89"
    assert targets(["6.1"]) == "80 ON"
    assert targets(["12.0"], known=CUDA_12_4, state="wheel") == "75-real;80-real;86-real;89-real;90"
