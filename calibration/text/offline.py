"""Calibration text that every Python installation carries: prose, code and conversations, without a network.

Modules of the standard library take turns: one gives its source (code), the next its docstrings (prose of
modules and classes, conversations about functions), so that no text is given twice. pydoc's topics, the
language reference in plain text, join the prose. Nothing is imported or run: sources are parsed. Order and
text depend on the Python version alone, as far as distributors leave the library as it is.
"""

import ast
import inspect
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

Message = dict[str, str]  # "role" and "content", as chat templates take them
Conversation = list[Message]

# Share of each kind, in characters, of what `documents` gives.
SHARES = {"prose": 0.4, "code": 0.4, "chat": 0.2}

# Not the same everywhere: split off or changed by distributors, made for one machine, or tables of numbers.
_LEFT_OUT = frozenset(
    {"_aix_support", "_bootsubprocess", "_osx_support", "antigravity", "distutils", "encodings", "ensurepip"}
    | {"idlelib", "lib2to3", "pydoc_data", "site", "sysconfig", "test", "this", "tkinter", "turtle"}
    | {"turtledemo", "venv"}
)
_SHORTEST = 200  # characters of a docstring worth being a document of its own
_LONGEST = 24_000  # characters of a document; longer sources are cut at a blank line

_Definition = ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Documents of all three kinds as plain text, mixed by `SHARES`, until the first kind runs out.

    Conversations are given as `User:` and `Assistant:` paragraphs; `conversations` has them as messages.
    """
    kinds: dict[str, Iterator[str]] = {
        "prose": prose(),
        "code": code(),
        "chat": (plain_conversation(conversation) for conversation in conversations()),
    }
    given = dict.fromkeys(SHARES, 0)
    while True:
        kind = min(SHARES, key=lambda kind: given[kind] / SHARES[kind])
        text = next(kinds[kind], None)
        if text is None:
            return
        given[kind] += len(text)
        yield text


def prose() -> Iterator[str]:
    """Pydoc's topics and the docstrings of modules and classes, cleaned of their indentation."""
    from pydoc_data import topics  # half a megabyte, needed here only

    told = iter(dict.fromkeys(topics.topics[name] for name in sorted(topics.topics)))  # some have two names
    for module, source in _modules(1):
        yield from islice(told, 1)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) >= _SHORTEST:
                    title = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                    yield f"{title}\n\n{text}\n"
    yield from told


def code() -> Iterator[str]:
    """Sources of the standard library, a file a document, long files in several."""
    for _, source in _modules(0):
        yield from _pieces(source)


def conversations() -> Iterator[Conversation]:
    """Questions about functions of the standard library, answered by their docstrings and sources."""
    for module, source in _modules(1):
        lines = source.splitlines()
        for owner, node in _functions(ast.parse(source)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if len(text) < _SHORTEST or len(body) > _LONGEST:
                continue
            name = ".".join(filter(None, (module, owner, node.name)))
            yield [
                {"role": "user", "content": f"What does {name}({ast.unparse(node.args)}) do?"},
                {"role": "assistant", "content": text},
                {"role": "user", "content": "How is it implemented?"},
                {"role": "assistant", "content": f"```python\n{textwrap.dedent(body)}\n```"},
            ]


def plain_conversation(conversation: Conversation) -> str:
    """A conversation as text, for tokenizers without a chat template."""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in conversation) + "\n"


def _functions(tree: ast.Module) -> Iterator[tuple[str, _Definition]]:
    """(class or "", function) of the functions and methods at the top of a module, in order."""
    for node in tree.body:
        if isinstance(node, _Definition):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            yield from ((node.name, member) for member in node.body if isinstance(member, _Definition))


def _pieces(source: str) -> Iterator[str]:
    while len(source) > _LONGEST:
        cut = source.rfind("\n\n", 0, _LONGEST) + 1 or _LONGEST
        yield source[:cut]
        source = source[cut:].lstrip("\n")
    if source.strip():
        yield source


def _modules(remainder: int) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every second module, in the order of their names."""
    for i, (name, path) in enumerate(_paths()):
        if i % 2 == remainder:
            with tokenize.open(path) as file:  # honours coding cookies
                yield name, file.read()


@lru_cache(maxsize=1)
def _paths() -> tuple[tuple[str, Path], ...]:
    library = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path]] = []
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if (library / f"{name}.py").is_file():
            found.append((name, library / f"{name}.py"))
        for path in (library / name).rglob("*.py"):
            parts = path.relative_to(library).with_suffix("").parts
            if not {"test", "tests", "__main__"} & set(parts):
                found.append((".".join(part for part in parts if part != "__init__"), path))
    if not found:
        raise RuntimeError(
            f"no sources of the standard library under {library}: this Python has no text to calibrate"
            " on; choose a file or a dataset as calibration source"
        )
    return tuple(sorted(found))
