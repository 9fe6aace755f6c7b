"""The list of rooms and files in ARCHITECTURE.md, made of the first sentences of the files themselves.

`python -m dbrx_quant.scripts.dev.file_list` prints it; with `--write` it replaces the one on the page.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from dbrx_quant.scripts.terminal.output import quiet_on_closed_pipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->\n"

# Folders in the order in which they may know each other; within one, files and rooms likewise.
ORDER: dict[str, tuple[str, ...]] = {
    "runtime": (
        "output",
        "files",
        "library",
        "exl2",
        "kernels",
        "families",
        "tokenizer",
        "folder",
        "shards",
        "evaluation",
        "hybrid",
        "step",
        "model",
        "talk",
        "vllm",
    ),
    "calibration": ("text", "statistics", "blocks"),
    "quantize": (
        "declared",
        "solve",
        "options",
        "measurement",
        "entries",
        "budget",
        "rows",
        "first_pass",
        "second_pass",
        "estimate",
        "output",
        "work_folder",
        "workers",
        "conversion",
        "publish",
    ),
    "scripts": (
        "terminal",
        "report",
        "folders",
        "evaluation",
        "cli",
        "dev",
        "full_size",
        "gpu",
        "serving",
        "faults",
    ),
}


def listing() -> str:
    """The list as Markdown."""
    return "".join(_folder(folder, order) for folder, order in ORDER.items()) + _native()


def _folder(folder: str, order: tuple[str, ...]) -> str:
    lines = [f"### {folder}\n\n{_sentence(ROOT / folder / '__init__.py')}\n\n"]
    for name in order:
        place = ROOT / folder / name
        if place.is_dir():
            lines.append(f"**{folder}/{name}** {_sentence(place / '__init__.py')}\n\n")
            lines += [_item(file) for file in sorted(place.glob("*.py")) if file.stem != "__init__"]
            lines.append("\n")
        else:
            lines.append(f"**{folder}/{name}.py** {_sentence(place.with_suffix('.py'))}\n\n")
    return "".join(lines)


def _native() -> str:
    lines = ["### csrc\n\nKernels behind one plain C header; no torch, no Python.\n\n"]
    for folder in _source_folders(ROOT / "csrc"):
        lines.append(f"**{folder.relative_to(ROOT)}**\n\n")
        lines += [_item(file) for file in sorted(folder.iterdir()) if file.suffix in _SOURCES]
        lines.append("\n")
    return "".join(lines)


_SOURCES = (".h", ".cpp", ".cu", ".cuh")


def _source_folders(folder: Path) -> Iterator[Path]:
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(file.suffix in _SOURCES for file in inner.iterdir()):
            yield inner
        yield from _source_folders(inner)


def _item(file: Path) -> str:
    return f"- `{file.name}` {_sentence(file)}\n"


def _sentence(file: Path) -> str:
    """What a file says first about itself."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"(?:#pragma once\n+)?((?://[^\n]*\n)+)", text)
        said = re.sub(r"^// ?", "", comment[1], flags=re.MULTILINE) if comment else ""
    paragraph = " ".join(said.split("\n\n")[0].split())
    first = re.match(r".*?\.(?= |$)", paragraph)
    return first[0] if first else paragraph


@quiet_on_closed_pipe
def main() -> int:
    """Print or renew the list."""
    parser = argparse.ArgumentParser(description="List the files of the project with their first sentences.")
    parser.add_argument("--write", action="store_true", help="into ARCHITECTURE.md")
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{listing()}{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(listing())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
