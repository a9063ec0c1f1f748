"""Rehash every artifact below a folder against its manifest; exit with 1 when a file is damaged or missing.

    python -m stages.verify results/demo

Snakemake sees a file's time, not its bytes: this sees the bytes.
"""

import argparse
import json
import sys
from pathlib import Path

from stages.core import stage
from stages.core.artifact import file_digest, read_manifest
from stages.core.errors import UserError
from stages.inspection.origin import find_manifest, input_entries, root_of

IGNORED = ("run.json",)


def main(argv: list[str] | None = None) -> None:
    """Print every problem and a summary line."""
    parser = argparse.ArgumentParser(prog="python -m stages.verify", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a results folder, an artifact's folder, or a manifest")
    path = parser.parse_args(argv).path
    manifest, _ = find_manifest(path)
    if path.is_dir():
        paths = [found for found in sorted(path.glob("**/*manifest.json")) if not hidden(found, path)]
    else:
        if manifest is None:
            raise UserError(f"{path} is listed by no manifest in its folder: give a results folder, or a manifest.")
        paths = [manifest]
    problems, files = [], 0
    for found in paths:
        found_problems, count = check(found)
        problems += found_problems
        files += count
    problems += foreign(path, paths) if path.is_dir() else []
    for problem in problems:
        print(problem)
    print(f"{len(paths)} artifacts, {files} files: {f'{len(problems)} problems' if problems else 'all as written'}.")
    if any(not problem.startswith("foreign") for problem in problems):
        sys.exit(1)


def check(manifest_path: Path) -> tuple[list[str], int]:
    """Return (problems, number of files) of one artifact: bytes against digests, inputs against manifests."""
    try:
        manifest = read_manifest(manifest_path)
    except UserError as error:
        return [f"damaged  {error}"], 0
    problems = []
    for name, facts in manifest["data"].items():
        path = manifest_path.parent / name
        if not path.is_file():
            problems.append(f"missing  {path}: remove {manifest_path.name} beside it and run again to build it")
        elif file_digest(path) != facts["sha256"]:
            problems.append(
                f"damaged  {path}: its bytes are not those that {manifest['stage']} wrote; remove it and run again"
            )
    root = root_of(manifest)
    for name, entry in input_entries(manifest) if root else []:
        upstream = root / entry["path"]
        if upstream.is_file() and json.loads(upstream.read_bytes()).get("lineage") != entry["lineage"]:
            problems.append(
                f"outdated {manifest_path}: its input {name} ({entry['path']}) was rebuilt since with another identity"
            )
    return problems, len(manifest["data"])


def foreign(folder: Path, manifests: list[Path]) -> list[str]:
    """Return a line per file in the folders of artifacts that no manifest lists."""
    listed: set[Path] = set(manifests)
    for path in manifests:
        listed.add(path.with_name(path.name.replace("manifest.json", "run.json")))
        try:
            listed |= {path.parent / name for name in read_manifest(path)["data"]}
        except UserError:
            continue
    homes = {path.parent for path in manifests} - {folder}
    present = {item for home in homes for item in home.iterdir() if item.is_file() and not item.name.startswith(".")}
    return [f"foreign  {path}: no manifest lists it; nothing reads it" for path in sorted(present - listed)]


def hidden(path: Path, root: Path) -> bool:
    """Return whether a path lies in a hidden folder below `root` (staging, checkpoints)."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


if __name__ == "__main__":
    stage.run(main)
