"""The one-way imports: csrc ← runtime ← calibration ← quantize ← scripts, and between the rooms of each."""

import ast
import re
import subprocess
from collections import defaultdict

import pytest
from places import ROOT

from dbrx_quant.scripts.dev.file_list import ORDER, PAGE, listing

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


def room(name):
    """(layer, room) of a module by its dotted name; the room of a layer's own __init__ is None."""
    parts = name.split(".")[1:]
    return (parts[0], parts[1] if len(parts) > 1 else None) if parts and parts[0] in LAYERS else None


def runtime_imports(source):
    """What a source imports when it runs, at the top or in a function: TYPE_CHECKING blocks left out."""
    tree = ast.parse(source)
    kept = [n for n in ast.walk(tree) if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    hidden = {id(inner) for n in ast.walk(tree) if n not in kept for inner in ast.walk(n)}
    for node in kept:
        if isinstance(node, ast.ImportFrom) and id(node) not in hidden:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_rooms_that_stand_before_them(path):
    layer, *rest = path.relative_to(ROOT).with_suffix("").parts
    if rest == ["__init__"]:
        return
    order = ORDER[layer]
    own = order.index(rest[0])
    for name in runtime_imports(path.read_text(encoding="utf-8")):
        found = room(name)
        if found and found[0] == layer and found[1] in order:
            assert order.index(found[1]) <= own, f"{name} stands after {rest[0]}"


def test_every_room_has_its_place_in_the_order():
    for layer, order in ORDER.items():
        present = {
            path.stem
            for path in (ROOT / layer).iterdir()
            if (path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"))
            and path.stem != "__init__"
        }
        assert present == set(order), layer


def test_no_folder_has_more_than_sixteen_entries():
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if kept.returncode:
        pytest.skip("not a git checkout")
    entries = defaultdict(set)
    for file in kept.stdout.split():
        *folders, name = file.split("/")
        for depth, inner in enumerate([*folders[1:], name]) if folders else ():
            entries["/".join(folders[: depth + 1])].add(inner)
        entries[""].add(file.split("/")[0])
    for folder, inner in entries.items():
        shown = [name for name in inner if not name.startswith(".")]
        assert len(shown) <= 16, f"{folder}: {sorted(shown)}"


def test_the_map_lists_the_files_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert f"<!-- files -->\n\n{listing()}<!-- end of files -->" in page, (
        "run python -m dbrx_quant.scripts.dev.file_list --write"
    )


def test_every_file_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
    assert not re.findall(r"^- `[^`]*` *$", listing(), re.MULTILINE)
