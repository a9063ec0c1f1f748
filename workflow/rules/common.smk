# What all rules share: the plan of this run, and how each rule finds its part.

import re
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import regex_from_filepattern

from stages.core.errors import UserError
from stages.planning import run

try:
    if workflow.is_main_process:
        PLAN = run.start(config, workflow.configfiles, Path(workflow.basedir))
    else:
        PLAN = run.resume()
except UserError as error:
    raise WorkflowError(str(error))

ROOT = PLAN.root
NODES = PLAN.nodes
CONDA = workflow.source_path("../../envs/conda.yaml")


def corpora_of(stage):
    """Return a regular expression of the names of the corpora that a stage makes."""
    made = [re.escape(Path(node.manifest).parent.name) for node in NODES.values() if node.stage == stage]
    return "|".join(made) or "(?!)"


pathvars:
    root=ROOT,


wildcard_constraints:
    corpus=r"[a-z0-9][a-z0-9._-]*",
    generated=corpora_of("generate"),
    tokenizer=r"[a-z0-9][a-z0-9._-]*",
    teacher_tokenizer=r"[a-z0-9][a-z0-9._-]*",
    model=r"[a-z0-9][a-z0-9._-]*",
    teacher=r"[a-z0-9][a-z0-9._-]*",
    student=r"[a-z0-9][a-z0-9._-]*",
    experiment=r"[a-z0-9][a-z0-9._-]*",
    suite=r"[a-z0-9][a-z0-9._-]*",
    task=r"[a-z0-9][a-z0-9._-]*",
    variant=r"[a-z0-9][a-z0-9._-]*",
    shard=r"\d{4}",


envvars:
    run.PLAN_VARIABLE,


def part_of_plan(manifest):
    """Return the params that identify the artifact of `manifest` (a pattern), as strings."""

    def field(name):
        return lambda wildcards: run.field(PLAN, manifest.format(**wildcards), name)

    return {name: field(name) for name in ("root", "spec", "code", "lineage")}


def inputs_of(manifest):
    """Return the input function for the artifact of `manifest` (a pattern).

    Manifests are ordinary inputs: small, so compared by content. Data must exist but never triggers by its time.
    """

    def files(wildcards):
        node = NODES.get(manifest.format(**wildcards))
        if node is None:
            raise WorkflowError(f"{ROOT}/{manifest.format(**wildcards)} is no part of this config.")
        upstream = [NODES[name] for name in node.inputs]
        return {
            "manifests": [f"{ROOT}/{node.manifest}" for node in upstream],
            "data": [
                ancient(path) for node in upstream for path in files_of(node) if path != f"{ROOT}/{node.manifest}"
            ],
        }

    return files


def files_of(node):
    """Return the declared files of a node, its manifest among them."""
    output = getattr(rules, node.stage).output
    values = re.fullmatch(regex_from_filepattern(str(output.manifest)), f"{ROOT}/{node.manifest}").groupdict()
    return [str(pattern).format(**values) for pattern in output]


def everything(*stages):
    """Return all files of all artifacts, or of those stages."""
    return [path for node in NODES.values() if not stages or node.stage in stages for path in files_of(node)]


def resource(stage, name):
    """Return what a job of `stage` may use: from the config's `resources`, else the default below."""
    return PLAN.resources.get(stage, {}).get(name, RESOURCES.get(stage, {}).get(name, RESOURCES["default"][name]))


def launcher(stage):
    """Return the command in front of a training stage: one process for each of the job's GPUs."""
    processes = resource(stage, "gpu")
    if processes > 1:
        return f"accelerate launch --multi_gpu --num_processes {processes} --module"
    return "python -m"


# Memory in MB, runtime in minutes. Configs change these under `resources`, profiles with set-resources.
RESOURCES = {
    "default": {"threads": 1, "mem_mb": 2000, "runtime": 60, "gpu": 0},
    "tokenizer_stats": {"mem_mb": 4000},
    "mined_mapping": {"threads": 2, "mem_mb": 4000, "runtime": 240},
    "tokenizer_bias": {"threads": 2, "mem_mb": 4000},
    "pretrain": {"threads": 2, "mem_mb": 8000, "runtime": 240},
    "initialize": {"mem_mb": 16000},
    "teacher_head": {"mem_mb": 16000},
    "generate": {"threads": 2, "mem_mb": 16000, "runtime": 1440},
    "teacher_signals": {"threads": 2, "mem_mb": 16000, "runtime": 720},
    "distill": {"threads": 2, "mem_mb": 32000, "runtime": 1440},
    "evaluate": {"threads": 2, "mem_mb": 16000, "runtime": 240},
}
