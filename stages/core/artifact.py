"""Artifacts on disk: data files and the small manifest that makes them one thing.

An artifact is a manifest (`manifest.json`, or `<name>.manifest.json` where several share a folder) and the data
files it lists, beside it. Data is written into a hidden staging folder, hashed, synced and renamed; the
manifest comes last, so that a manifest always describes complete files. What differs between two identical
runs (time, host, restarts) goes to `run.json`, which is nobody's input.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.core import specs
from stages.core.errors import UserError

FORMAT = 1
RECORDED_PACKAGES = (
    "torch", "transformers", "tokenizers", "datasets", "pyarrow", "polars", "peft", "accelerate", "lm_eval",
)  # fmt: skip


@dataclass
class Draft:
    """What a stage fills in while it works; see `publish`."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    describe: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(path: Path, name: str = "") -> dict[str, Any]:
    """Return the manifest at `path` with its "path" and "name" added; UserError when missing or not a manifest."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stage = manifest["stage"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: build it first, `snakemake --cores all {path}`.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a manifest: remove it and run `snakemake --cores all {path}`.") from None
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise UserError(
            f"{path} ({stage}) has manifest format {found}, this code reads {FORMAT}: remove it and run again."
        )
    return manifest | {"path": path, "name": name or str(path)}


def check_lineage(manifest: dict[str, Any], expected: str) -> None:
    """Refuse an artifact that was built from other settings, inputs or code than this run expects."""
    if manifest["lineage"] != expected:
        path = manifest["path"]
        raise UserError(
            f"{path} has identity {manifest['lineage']} but this run expects {expected}: it was built with other "
            f"settings, inputs or code; rebuild it with `snakemake --cores all --forcerun {manifest['stage']} {path}`."
        )


def data_path(manifest: dict[str, Any], name: str) -> Path:
    """Return the path of data file `name`; UserError when it is not there or not as long as it was written."""
    if name not in manifest["data"]:
        raise UserError(f"{manifest['path']} lists no file {name}; it holds {', '.join(manifest['data'])}.")
    path = manifest["path"].parent / name
    size = path.stat().st_size if path.is_file() else None
    expected = manifest["data"][name]["bytes"]
    if size != expected:
        found = "is missing" if size is None else f"holds {size} bytes instead of {expected}"
        raise UserError(f"{path} {found}: run `snakemake --cores all`, which builds it again.")
    return path


def damage(manifest_path: Path) -> str | None:
    """Return a sentence on what is wrong with an artifact's files by their sizes, or None."""
    try:
        manifest = read_manifest(manifest_path)
        for name in manifest["data"]:
            data_path(manifest, name)
    except UserError as error:
        return str(error)
    return None


def outdated(manifest_path: Path, spec: dict[str, Any], code: str, root: Path) -> str | None:
    """Return a sentence on why the artifact on disk is not the one of these settings and code, None when it is.

    Its files are told by their sizes, the artifacts under `root` that it was made from by their manifests' content.
    """
    fault = damage(manifest_path)
    if fault:
        return fault
    manifest = read_manifest(manifest_path)
    if manifest["lineage"] != specs.lineage(specs.canonical(spec), code):
        was, now = _made_of(manifest["spec"], manifest["code"]), _made_of(spec, code)
        differing = [name for name in now if was[name] != now[name]] or ["identity"]
        return f"{manifest_path} was made of other {' and '.join(differing)}."
    for value in manifest["inputs"].values():
        for entry in value if isinstance(value, list) else [value]:
            upstream = root / entry["path"]
            if upstream.is_file() and file_digest(upstream) != entry["sha256"]:
                return f"{manifest_path} was made of {entry['path']} before that was built again."
    return None


def _made_of(spec: dict[str, Any], code: str) -> dict[str, str]:
    settings = {key: value for key, value in spec.items() if key != "inputs"}
    return {"settings": specs.canonical(settings), "inputs": specs.canonical(spec.get("inputs")), "code": code}


def is_finished(manifest_path: Path, spec: dict[str, Any], code: str, root: Path) -> bool:
    """Return whether the artifact of these settings and code is on disk, byte by byte, made with today's versions."""
    if not manifest_path.is_file() or outdated(manifest_path, spec, code, root):
        return False
    manifest = read_manifest(manifest_path)
    files = manifest["data"].items()
    return manifest["versions"] == _versions() and all(
        file_digest(manifest_path.parent / name) == facts["sha256"] for name, facts in files
    )


@contextmanager
def publish(
    manifest_path: Path,
    *,
    stage: str,
    spec: dict[str, Any],
    code: str,
    lineage: str,
    inputs: dict[str, Any],
    started: float | None = None,
) -> Iterator[Draft]:
    """Yield a Draft whose `folder` takes the data files; publish them and the manifest when the block ends.

    `inputs` maps a name to a manifest, or to a list of manifests. `draft.describe[file]` may hold facts on a
    file (rows, columns, shapes), `draft.metrics` the figures worth reading. When the block raises, the
    staging folder goes and an earlier artifact at the same place stays as it was.
    """
    home = manifest_path.parent
    home.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(home, manifest_path.stem)
    staging = home / f".{manifest_path.stem}.{platform.node()}.{os.getpid()}.partial"
    staging.mkdir()
    draft = Draft(staging)
    started = started or time.time()
    try:
        yield draft
        manifest = {
            "format": FORMAT,
            "stage": stage,
            "spec": spec,
            "code": code,
            "lineage": lineage,
            "inputs": {name: _input_digests(value) for name, value in inputs.items()},
            "data": _describe_files(staging, draft.describe),
            "metrics": draft.metrics,
            "versions": _versions(),
        }
        run = {"seconds": round(time.time() - started, 3), "host": platform.node(), "finished": time.time()} | draft.run
        # All is on disk before the earlier artifact is touched.
        write_json(staging / manifest_path.name, manifest)
        write_json(staging / _run_name(manifest_path), run)
        _move_into_place(manifest_path, staging, set(manifest["data"]))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable, sorted JSON beside `path`, sync it and rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(home: Path, stem: str) -> None:
    """Remove staging folders of processes of this machine that are gone (a killed job)."""
    for folder in home.glob(f".{stem}.{platform.node()}.*.partial"):
        pid = folder.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _describe_files(staging: Path, extra: dict[str, dict[str, Any]]) -> dict[str, Any]:
    described = {}
    for path in sorted(staging.iterdir()):
        if path.is_dir():
            raise ValueError(f"an artifact holds files only, found the folder {path.name}")
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        facts = {"sha256": file_digest(path), "bytes": path.stat().st_size}
        described[path.name] = facts | extra.get(path.name, {})
    return described


def _move_into_place(manifest_path: Path, staging: Path, names: set[str]) -> None:
    """Rename a complete artifact into its home, the manifest last; data files that only an earlier one had go."""
    home = manifest_path.parent
    try:
        outdated = set(read_manifest(manifest_path)["data"]) - names
    except UserError:
        outdated = set()
    manifest_path.unlink(missing_ok=True)
    for name in [*sorted(names), _run_name(manifest_path), manifest_path.name]:
        os.replace(staging / name, home / name)
    for name in outdated:
        (home / name).unlink(missing_ok=True)
    folder = os.open(home, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _run_name(manifest_path: Path) -> str:
    return manifest_path.name.replace("manifest.json", "run.json")


def _input_digests(value: Any) -> Any:
    if isinstance(value, list):
        return [_input_digests(item) for item in value]
    return {"path": value["name"], "lineage": value["lineage"], "sha256": file_digest(value["path"])}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape results, where installed."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
