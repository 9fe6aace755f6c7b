"""What a wheel holds: all of the package and the native library, and nothing of the checkout around it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import PurePosixPath

import pytest
from places import ROOT

PACKAGES = ("runtime", "calibration", "quantize", "scripts")
LEFT_OUT = (".sh", ".pyc")
FILES = {
    f"dbrx_quant/{file.relative_to(ROOT)}"
    for name in PACKAGES
    for file in (ROOT / name).rglob("*")
    if file.is_file() and file.suffix not in LEFT_OUT and ROOT / "scripts" / "dev" not in file.parents
} | {"dbrx_quant/__init__.py", "dbrx_quant/py.typed"}
LIBRARIES = {"dbrx_quant/runtime/libdbrxq_cpu.so", "dbrx_quant/runtime/libdbrxq_cuda.so"}

USE_IT = """
import sys
sys.path[:0] = [sys.argv[1]]
from dbrx_quant.runtime.library import _native
from dbrx_quant.scripts.cli.main import main
assert _native.__file__.startswith(sys.argv[1]), _native.__file__
sys.exit(main(["doctor", "--json"]))
"""


def wheel_faults(names):
    """What is missing from the files of a wheel, and what should not be there."""
    information = [name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")]
    package = {name for name in names if name not in information}
    faults = [f"missing: {name}" for name in sorted(FILES) if name not in package]
    faults += [f"extra: {name}" for name in sorted(package - FILES - LIBRARIES)]
    if not package & LIBRARIES:
        faults.append("missing: the native library")
    for required in ("LICENSE", "entry_points.txt", "METADATA"):
        if required not in {PurePosixPath(name).name for name in information}:
            faults.append(f"missing: {required}")
    return faults


def test_an_installed_wheel_is_complete():
    installed = distribution("dbrx-quant")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("installed from the checkout, not from a wheel")
    names = [str(file) for file in installed.files or ()]
    own = [n for n in names if not n.startswith("..") and "__pycache__" not in n]  # `..` is the command
    assert wheel_faults(own) == []


def test_faults_are_seen():
    assert {f"dbrx_quant/{name}/__init__.py" for name in PACKAGES} < FILES
    complete = [*FILES, "dbrx_quant/runtime/libdbrxq_cpu.so"]
    complete += [f"x.dist-info/{name}" for name in ("licenses/LICENSE", "entry_points.txt", "METADATA")]
    assert wheel_faults(complete) == []
    assert wheel_faults(complete[:-1]) == ["missing: METADATA"]
    assert wheel_faults([*complete, "tests/project/test_wheel.py"]) == ["extra: tests/project/test_wheel.py"]
    assert wheel_faults([n for n in complete if not n.endswith(".so")]) == ["missing: the native library"]


@pytest.mark.slow
def test_a_wheel_can_be_built_and_used(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation"]
    build += ["-w", str(tmp_path), "-C", f"build-dir={tmp_path / 'build'}"]
    build += ["-C", "cmake.define.DBRXQ_CUDA_ARCHITECTURES=all"]
    subprocess.run(build, check=True, capture_output=True, timeout=2400)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        assert wheel_faults(opened.namelist()) == []
        opened.extractall(tmp_path / "unpacked")
    # -S leaves out the hook of an editable install; the libraries are those of this environment
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE_IT, str(tmp_path / "unpacked")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["native"]["usable"]
    if shutil.which("nvcc"):
        assert found["cuda"]["library"] == "usable"
        assert found["cuda"]["targets"].startswith("7.5, 8.0, 8.6, 8.9, 9.0")
        assert "PTX" in found["cuda"]["targets"]
