"""Real text that every CPython carries: the pydoc topics and the docstrings of the standard library."""

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "idlelib", "lib2to3", "turtledemo",
    "pydoc_data", "_bundled",
}  # fmt: skip


def python_documents() -> Iterator[str]:
    """Yield one text per pydoc topic, then one per module of the standard library: its docstrings, each under its name.

    Sources are parsed, not imported, in sorted order. The texts depend on the version of Python alone.
    """
    from pydoc_data.topics import topics

    yield from (topics[name].strip() + "\n" for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if not _SKIPPED.intersection(place.parts[:-1]):
            text = _docstrings(path, ".".join(place.with_suffix("").parts).removesuffix(".__init__"))
            if text:
                yield text


def _docstrings(path: Path, module: str) -> str:
    try:
        with tokenize.open(path) as stream, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(stream.read())
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""
    entries = [f"{name}\n\n{text}\n" for name, text in _entries(tree, module)]
    return "\n".join(entries)


def _entries(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        yield name, cleandoc(text).encode(errors="replace").decode()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _entries(child, f"{name}.{child.name}")
