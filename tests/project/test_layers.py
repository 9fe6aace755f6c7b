"""The one-way imports: csrc ← runtime ← calibration ← quantize ← scripts, read from the sources."""

import ast
import re

import pytest
from places import ROOT

LAYERS = ("runtime", "calibration", "quantize", "scripts")
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_names(source):
    """Every module that a source imports anywhere in it, functions and TYPE_CHECKING blocks included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def layer_faults(layer, source):
    """Imports of a source that its layer does not allow."""
    lower = LAYERS[: LAYERS.index(layer) + 1]
    faults = []
    for name in imported_names(source):
        top, *rest = name.split(".")
        upward = top == "dbrx_quant" and not (rest and rest[0] in lower)
        if upward or top in ("", "tests", *LAYERS):
            faults.append(name)
    return faults


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_their_own_layer_or_lower_ones(path):
    layer = path.relative_to(ROOT).parts[0]
    assert layer_faults(layer, path.read_text(encoding="utf-8")) == []


def test_every_layer_has_modules():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("runtime", "from dbrx_quant.quantize.conversion import convert"),
        ("runtime", "import dbrx_quant.calibration.text.tokens"),
        ("calibration", "from dbrx_quant import quantize"),
        ("quantize", "def f():\n    from dbrx_quant.scripts.cli.main import main"),
        ("quantize", "from .grid import search"),
        ("scripts", "import runtime"),
        ("scripts", "import dbrx_quant"),
    ],
)
def test_the_rule_sees_forbidden_imports(layer, line):
    assert layer_faults(layer, line)


def test_native_sources_know_neither_python_nor_torch():
    includes = re.compile(r"^\s*#\s*include\s*[<\"](Python\.h|torch/|ATen/|c10/|pybind11/)", re.MULTILINE)
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".c", ".cpp", ".cu", ".cuh")]
    assert sources
    assert [str(path) for path in sources if includes.search(path.read_text(encoding="utf-8"))] == []
