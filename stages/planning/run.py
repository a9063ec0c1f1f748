"""One run of Snakemake: the plan is made once, written down, and read by every job that starts later.

Jobs parse the Snakefile again when they start, perhaps hours later on another node. They find the plan through one
environment variable, so that a config or module edited meanwhile changes nothing in this run.
"""

import json
import os
import sys
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core import artifact, specs
from stages.core.errors import UserError
from stages.planning import check, expand, plan, sources

PLAN_VARIABLE = "TOKENSTILL_PLAN"
LONGEST_ARGUMENT = 50_000
RECORDS = Path(".snakemake/metadata")
SCHEMA = Path("workflow/schemas/config.schema.yaml")


@dataclass(frozen=True)
class Plan:
    """All artifacts of a run, and the folder they go to."""

    root: str
    nodes: dict[str, plan.Node]
    resources: dict[str, dict[str, int]]


def start(config: dict[str, Any], files: list[str | Path], base: Path) -> Plan:
    """Make the plan from the config, write it under its root, and name it in the environment for later jobs.

    `files` are the config files as written, `base` the folder of the Snakefile. UserError for a faulty config.
    """
    import yaml

    _prefer_this_python()
    check.refuse_duplicate_keys([Path(file) for file in files])
    schema = yaml.safe_load((base / SCHEMA).read_text(encoding="utf-8"))
    full = expand.expand(config, schema)
    root = Path("results") / full["name"]
    digests = sources.Digests(root / ".digests.json")
    nodes = plan.build(full, digests)
    digests.save()
    made = Plan(str(root), nodes, full["resources"])
    value = {"root": made.root, "nodes": plan.to_json(nodes), "resources": made.resources, "config": full}
    path = root / ".plans" / f"{specs.digest(specs.canonical(value))}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(path, value)
    os.environ[PLAN_VARIABLE] = str(path.resolve())
    _set_aside(made)
    return made


def resume() -> Plan:
    """Return the plan that the main process wrote."""
    _prefer_this_python()
    try:
        value = json.loads(Path(os.environ[PLAN_VARIABLE]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError) as error:
        raise UserError(
            f"The plan of this run cannot be read ({PLAN_VARIABLE}: {error}); jobs need the same file system as "
            "the main process."
        ) from None
    return Plan(value["root"], plan.from_json(value["nodes"]), value["resources"])


def field(made: Plan, manifest: str, name: str) -> str:
    """Return root, spec, code or lineage of an artifact as the command line takes them; empty for what is not planned.

    The spec is canonical JSON, or "@file" where it is too long for a command line (128 kB in Linux).
    """
    node = made.nodes.get(manifest)
    if name == "root" or node is None:
        return made.root if name == "root" else ""
    if name != "spec":
        return getattr(node, name)
    text = specs.canonical(node.spec)
    if len(text) < LONGEST_ARGUMENT:
        return text
    path = Path(made.root) / ".plans" / f"{specs.digest(text)}.spec.json"
    if not path.exists():
        artifact.write_json(path, node.spec)
    return f"@{path}"


def _set_aside(made: Plan) -> None:
    """Rename the manifests that Snakemake would wrongly trust, so that their artifacts are built again.

    These are artifacts whose files are cut off or missing and, where Snakemake has no record to compare with (a
    removed .snakemake, results copied from elsewhere), those that carry another identity than planned.
    """
    for node in made.nodes.values():
        path = Path(made.root) / node.manifest
        if not path.exists():
            continue
        fault = artifact.damage(path)
        if fault is None and not _is_recorded(path) and artifact.read_manifest(path)["lineage"] != node.lineage:
            fault = f"{path} was built with other settings, inputs or code"
        if fault:
            os.replace(path, path.with_name(f"{path.name}.aside"))
            print(f"{fault.split(': ')[0]}: set aside as {path.name}.aside and built again.", file=sys.stderr)


def _is_recorded(path: Path) -> bool:
    """Return whether Snakemake remembers what it made `path` from (snakemake/persistence/file.py)."""
    name = urlsafe_b64encode(str(path).encode()).decode()
    return (RECORDS / (name if len(name) < 255 else f"@{name[:254]}")).exists()


def _prefer_this_python() -> None:
    """Make `python` in a rule the one that runs Snakemake; conda and containers put theirs before it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
