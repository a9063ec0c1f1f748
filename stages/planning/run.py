"""One run of Snakemake: the plan is made once, written down, and read by every job that starts later.

Jobs parse the Snakefile again when they start, perhaps hours later on another node. They find the plan through one
environment variable, so that a config or module edited meanwhile changes nothing in this run.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core import artifact, specs
from stages.core.errors import UserError
from stages.planning import check, expand, plan, sources

PLAN_VARIABLE = "TOKENSTILL_PLAN"
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
    _set_aside_damaged(made)
    return made


def resume() -> Plan:
    """Return the plan that the main process wrote."""
    try:
        value = json.loads(Path(os.environ[PLAN_VARIABLE]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError) as error:
        raise UserError(
            f"The plan of this run cannot be read ({PLAN_VARIABLE}: {error}); jobs need the same file system as "
            "the main process."
        ) from None
    return Plan(value["root"], plan.from_json(value["nodes"]), value["resources"])


def field(node: plan.Node, name: str) -> str:
    """Return spec (canonical JSON), code or lineage of a node, as the command line takes them."""
    return specs.canonical(node.spec) if name == "spec" else getattr(node, name)


def outdated(made: Plan) -> list[str]:
    """Return the manifests on disk that carry another identity than planned."""
    found = []
    for node in made.nodes.values():
        path = Path(made.root) / node.manifest
        try:
            if path.exists() and artifact.read_manifest(path)["lineage"] != node.lineage:
                found.append(str(path))
        except UserError:
            continue
    return found


def _set_aside_damaged(made: Plan) -> None:
    """Rename the manifest of an artifact whose files are cut off or missing, so that it is built again."""
    for node in made.nodes.values():
        path = Path(made.root) / node.manifest
        fault = artifact.damage(path) if path.exists() else None
        if fault:
            os.replace(path, path.with_name(path.name + ".damaged"))
            print(f"{fault.split(': run ')[0]}: set aside as {path.name}.damaged and built again.", file=sys.stderr)
