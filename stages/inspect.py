"""Print what an artifact is: stage, identity, origin, settings, files, metrics, and a sample decoded to text.

python -m stages.inspect results/demo/corpora/python-docs
python -m stages.inspect results/demo/teachers/big/python-docs/part-0000.parquet
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from stages.core import stage
from stages.core.artifact import data_path, read_manifest
from stages.core.errors import UserError

SAMPLED = (".parquet", ".safetensors", ".jsonl")


def main(argv: list[str] | None = None) -> None:
    """Print a manifest, a folder with one, one data file, or the list of artifacts below a folder."""
    parser = argparse.ArgumentParser(prog="python -m stages.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a manifest, a folder, or a data file")
    path = parser.parse_args(argv).path
    from stages.inspection.origin import find_manifest

    manifest_path, file = find_manifest(path)
    if manifest_path is None and file is None:
        print(overview(path))
        return
    manifest = read_manifest(manifest_path) if manifest_path else None
    if manifest:
        print(describe(manifest))
    for name, target, owner in [(file.name, file, manifest)] if file else files(manifest):
        from stages.inspection.samples import sample

        print(f"\n{name}")
        print(sample(target, owner) if isinstance(target, Path) else f"  {target}")


def overview(folder: Path) -> str:
    """Return one line per artifact below a folder."""
    from stages.inspection.text import size, table

    rows = []
    for path in sorted(folder.glob("**/*manifest.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            manifest = read_manifest(path)
        except UserError:
            rows.append((str(path.relative_to(folder)), "not a manifest", "", ""))
            continue
        bytes_ = sum(facts["bytes"] for facts in manifest["data"].values())
        rows.append((str(path.relative_to(folder)), manifest["stage"], manifest["lineage"][:12], size(bytes_)))
    return table(("manifest", "stage", "identity", "size"), rows, indent="")


def describe(manifest: dict[str, Any]) -> str:
    """Return everything a manifest says, as text."""
    from stages.inspection.origin import chain, run_facts
    from stages.inspection.text import size, table

    spec = {key: value for key, value in manifest["spec"].items() if key != "inputs"}
    run = run_facts(manifest["path"])
    rows = [
        (name, size(facts["bytes"]), facts["sha256"][:12], short_json(_rest(facts)))
        for name, facts in manifest["data"].items()
    ]
    parts = [
        f"{manifest['path']}",
        f"stage     {manifest['stage']}",
        f"identity  {manifest['lineage']}",
        f"code      {manifest['code']}",
    ]
    if run:
        parts.append(f"run       {run.get('seconds')} s on {run.get('host')}")
    parts += ["made from", *(chain(manifest) or ["  nothing upstream"])]
    parts += ["settings", indented(spec), "files", table(("file", "size", "sha256", "facts"), rows)]
    if manifest["metrics"]:
        parts += ["metrics", indented(manifest["metrics"])]
    parts.append("versions  " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()))
    return "\n".join(parts)


def files(manifest: dict[str, Any]) -> list[tuple[str, Path | str, dict[str, Any]]]:
    """Return (name, path, manifest) of the data files worth a sample; for a damaged one, the sentence that says so.

    An index has nothing to show but its shards: the first of them is shown.
    """
    from stages.inspection.origin import open_input

    found: list[tuple[str, Path | str, dict[str, Any]]] = []
    for name in manifest["data"]:
        try:
            path: Path | str = data_path(manifest, name)
        except UserError as error:
            path = str(error)
        if not isinstance(path, Path) or path.suffix in SAMPLED or name == "results.json":
            found.append((name, path, manifest))
    shard = open_input(manifest, "shards")
    return found + (files(shard) if shard else [])


def indented(value: dict[str, Any]) -> str:
    """Return one line per key, nested values as short JSON."""
    return "\n".join(f"  {key}: {short_json(item)}" for key, item in value.items()) or "  none"


def short_json(value: Any) -> str:
    """Return JSON cut to a line."""
    from stages.inspection.text import shorten

    return shorten(json.dumps(value, ensure_ascii=False), 100)


def _rest(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("sha256", "bytes")}


if __name__ == "__main__":
    if sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    stage.run(main)
