"""One run of Snakemake: the plan is made once, written down, and read by every job that starts later.

Jobs parse the Snakefile again when they start, perhaps hours later on another node. They find the plan through one
environment variable, so that a config or module edited meanwhile changes nothing in this run.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.core import artifact, specs
from stages.core.errors import UserError
from stages.planning import check, expand, plan, sources

PLAN_VARIABLE = "TOKENSTILL_PLAN"
LONGEST_ARGUMENT = 50_000
SCHEMA = Path("workflow/schemas/config.schema.yaml")


@dataclass(frozen=True)
class Plan:
    """All artifacts of a run, the folder they go to, and the full config they follow from."""

    root: str
    nodes: dict[str, plan.Node]
    resources: dict[str, dict[str, int]]
    config: dict[str, Any]
    digests: sources.Digests | None = dataclasses.field(default=None, compare=False)

    @cached_property
    def path(self) -> Path:
        """Where jobs find this plan."""
        return Path(self.root) / ".plans" / f"{specs.digest(specs.canonical(self._value()))}.json"

    def write(self) -> None:
        """Write what jobs read. Only a run that starts jobs does this: a dry run leaves no trace."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files = {self.path: self._value()}
        files |= {
            _spec_file(self, text): json.loads(text) for text in map(_spec, self.nodes.values()) if _is_long(text)
        }
        for path, value in files.items():
            if not path.exists():
                artifact.write_json(path, value)
        if self.digests:
            self.digests.save()

    def outdated(self, manifest: str) -> str | None:
        """Return a sentence on why an artifact on disk is not the planned one, None when it is or there is none."""
        path, node = Path(self.root) / manifest, self.nodes[manifest]
        return artifact.outdated(path, node.spec, node.code, Path(self.root)) if path.exists() else None

    def _value(self) -> dict[str, Any]:
        nodes = plan.to_json(self.nodes)
        return {"root": self.root, "nodes": nodes, "resources": self.resources, "config": self.config}


def start(config: dict[str, Any], files: list[str | Path], base: Path) -> Plan:
    """Make the plan from the config and name it in the environment for later jobs; `write` writes it down.

    `files` are the config files as written, `base` the folder of the Snakefile. UserError for a faulty config.
    """
    import yaml

    _prefer_this_python()
    check.refuse_duplicate_keys([Path(file) for file in files])
    schema = yaml.safe_load((base / SCHEMA).read_text(encoding="utf-8"))
    full = expand.expand(config, schema)
    root = Path("results") / full["name"]
    digests = sources.Digests(root / ".digests.json")
    made = Plan(str(root), plan.build(full, digests), full["resources"], full, digests)
    os.environ[PLAN_VARIABLE] = str(made.path.resolve())
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
    return Plan(**value | {"nodes": plan.from_json(value["nodes"])})


def field(made: Plan, manifest: str, name: str) -> str:
    """Return root, spec, code or lineage of an artifact as the command line takes them; empty for what is not planned.

    The spec is canonical JSON, or "@file" where it is too long for a command line (128 kB in Linux).
    """
    node = made.nodes.get(manifest)
    if name == "root" or node is None:
        return made.root if name == "root" else ""
    if name != "spec":
        return getattr(node, name)
    text = _spec(node)
    return f"@{_spec_file(made, text)}" if _is_long(text) else text


def _spec(node: plan.Node) -> str:
    return specs.canonical(node.spec)


def _is_long(text: str) -> bool:
    return len(text) >= LONGEST_ARGUMENT


def _spec_file(made: Plan, text: str) -> Path:
    return Path(made.root) / ".plans" / f"{specs.digest(text)}.spec.json"


def _prefer_this_python() -> None:
    """Make `python` in a rule the one that runs Snakemake; conda and containers put theirs before it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
