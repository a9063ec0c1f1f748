"""From a path to the artifact it belongs to, and from an artifact to those it was made from."""

import json
from pathlib import Path
from typing import Any

from stages.core.artifact import read_manifest
from stages.core.errors import UserError

LINES = 40  # of a history that are shown


def find_manifest(path: Path) -> tuple[Path | None, Path | None]:
    """Return (manifest, file): the manifest that `path` is or belongs to, and the data file when it names one.

    The manifest is None for a file that none lists; both are None for a folder of several artifacts. UserError when
    there is nothing at `path`, or a folder without artifacts.
    """
    if not path.exists():
        near = next((parent for parent in path.parents if parent.exists()), Path("."))
        inside = ", ".join(sorted(item.name for item in near.iterdir() if not item.name.startswith("."))[:8])
        raise UserError(f"{path} does not exist; {near} holds {inside or 'nothing'}.")
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return path / "manifest.json", None
        below = list(path.glob("**/*manifest.json"))
        if below:
            return below[0] if len(below) == 1 else None, None
        raise UserError(f"{path} holds no manifest: give a manifest, a folder with one, or a data file.")
    if path.name.endswith("manifest.json"):
        return path, None
    for candidate in sorted(path.parent.glob("*manifest.json")):
        try:
            if path.name in read_manifest(candidate)["data"]:
                return candidate, path
        except UserError:
            continue
    return None, path


def root_of(manifest: dict[str, Any]) -> Path | None:
    """Return the results folder that the input paths of a manifest are relative to, None when they are not there."""
    wanted = [entry["path"] for _, entry in input_entries(manifest)]
    for parent in manifest["path"].resolve().parents:
        if wanted and (parent / wanted[0]).is_file():
            return parent
    return None


def input_entries(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, {path, lineage, sha256}) of every input of a manifest, lists in order."""
    entries = []
    for name, value in manifest["inputs"].items():
        entries += [(name, item) for item in (value if isinstance(value, list) else [value])]
    return entries


def open_input(manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the manifest of the input called `name` (the first of a list), None when it has none or it is gone."""
    root = root_of(manifest)
    for entry_name, entry in input_entries(manifest):
        if entry_name == name and root is not None and (root / entry["path"]).is_file():
            return read_manifest(root / entry["path"], entry["path"])
    return None


def chain(manifest: dict[str, Any]) -> list[str]:
    """Return one line per artifact upstream, indented by depth; each artifact is expanded once."""
    root, seen, lines = root_of(manifest), set(), []

    def visit(current: dict[str, Any], depth: int) -> None:
        entries = input_entries(current)
        for name, entry in entries[:8]:
            path = entry["path"]
            upstream = root / path if root else None
            state = "" if upstream and upstream.is_file() else "  (not here)"
            if upstream and upstream.is_file():
                opened = read_manifest(upstream, path)
                if opened["lineage"] != entry["lineage"]:
                    state = "  (rebuilt since: other identity)"
            repeated = path in seen
            lines.append(f"{'  ' * depth}{name}: {path}  {entry['lineage'][:12]}{state}{'  …' if repeated else ''}")
            if upstream and upstream.is_file() and not repeated:
                seen.add(path)
                visit(opened, depth + 1)
        if len(entries) > 8:
            lines.append(f"{'  ' * depth}… and {len(entries) - 8} more")

    visit(manifest, 1)
    return lines if len(lines) <= LINES else [*lines[:LINES], f"  … {len(lines) - LINES} more lines"]


def run_facts(manifest_path: Path) -> dict[str, Any]:
    """Return the run.json beside a manifest (seconds, host), empty when there is none."""
    path = manifest_path.with_name(manifest_path.name.replace("manifest.json", "run.json"))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
