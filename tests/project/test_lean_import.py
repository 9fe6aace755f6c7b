"""The command answers at once: its help, its version and its usage errors import nothing heavy."""

import resource
import subprocess
import sys

import pytest

from dbrx_quant.scripts.cli import main

HEAVY = ("torch", "transformers", "numpy", "datasets", "safetensors", "rich", "tqdm")
VERBS = tuple(verb.name for verb in main.VERBS)

RUN = f"""
import sys
from dbrx_quant.scripts.cli.main import main
try:
    main(sys.argv[1:])
finally:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("loaded:", *loaded, file=sys.stderr)
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_imports_nothing_heavy(verb):
    done = run(verb, "--help")
    assert done.returncode == 0
    assert f"dbrx-quant {verb}" in done.stdout.split("example:")[1]
    assert done.stderr == "loaded:\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["frobnicate"], 2),
        (["convert", "model", "out"], 2),
        (["convert", "model", "out", "--bpw", "1.5"], 2),
    ],
)
def test_usage_imports_nothing_heavy(arguments, code):
    done = run(*arguments)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == "loaded:"


def test_help_takes_less_than_half_a_second():
    # of the processor, which is what a machine that nobody else uses would take on the clock
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("convert", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_importing_the_runtime_loads_no_torch():
    code = "import dbrx_quant.runtime, sys; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_the_package_has_a_version_and_its_functions_and_loads_no_torch_for_them():
    code = (
        "import dbrx_quant, sys\n"
        "version = dbrx_quant.__version__\n"
        "assert 'torch' not in sys.modules\n"
        "print(version, dbrx_quant.load_model.__name__, dbrx_quant.convert.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[1:] == ["load_model", "convert"]
