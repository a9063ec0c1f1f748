"""Digest of the code that a stage really uses.

Snakemake does not see the modules behind `python -m stages.x`. This walks the import statements of a
module through the project and hashes the syntax trees without docstrings, so that comments, docstrings
and formatting invalidate nothing and every real change does.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "stages"
ROOT = Path(__file__).resolve().parents[2]


def code_digest(*modules: str, root: Path = ROOT) -> str:
    """Return 32 hex digits over the syntax trees of `modules` and the project modules they import.

    Modules are dotted names such as "stages.distill". Raises FileNotFoundError for an unknown module.
    """
    hasher = hashlib.sha256()
    for name in sorted(_closure(modules, root)):
        hasher.update(f"{name} {_tree_digest(_source(name, root))}\n".encode())
    return hasher.hexdigest()[:32]


def _closure(modules: tuple[str, ...], root: Path) -> set[str]:
    """Return `modules` and every project module reachable from them by import statements."""
    found: set[str] = set()
    pending = list(modules)
    for name in pending:
        if _source(name, root) is None:
            raise FileNotFoundError(f"no module {name} under {root}")
    while pending:
        name = pending.pop()
        source = _source(name, root)
        if name in found or source is None:
            continue
        found.add(name)
        package = name.rpartition(".")[0]
        pending += [package] if package else []
        pending += _imports(source, name if source.name == "__init__.py" else package)
    return found


def _source(name: str, root: Path) -> Path | None:
    base = root.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(source: Path, package: str) -> list[str]:
    status = source.stat()
    return list(_parsed(source, status.st_mtime_ns, status.st_size, package)[1])


def _tree_digest(source: Path) -> str:
    status = source.stat()
    return _parsed(source, status.st_mtime_ns, status.st_size, "")[0]


@cache
def _parsed(source: Path, mtime_ns: int, size: int, package: str) -> tuple[str, tuple[str, ...]]:
    """Return (digest of the tree, imported project names); the stat values only key the cache."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = tuple(name for name in _imported_names(tree, package) if name.split(".")[0] == PACKAGE)
    _drop_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), names


def _imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            # `from stages.core import cli` may name a module or an attribute: unknown names are skipped.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _drop_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
