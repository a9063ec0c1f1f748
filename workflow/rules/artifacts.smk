# When an artifact is made again, and who touches its files.
#
# A manifest says what its artifact was made from (stages/core/artifact.py), so it alone decides whether the artifact is
# the planned one. Snakemake's own triggers compare times and records, which a failed or killed run leaves wrong. And a
# stage replaces its files itself when the new ones are whole, so Snakemake removes none: neither before a job nor
# after a failed one. Its `update()` does not give this: it copies every file, and puts old ones over new ones when a
# job fails after publishing.

import sys

from snakemake.dag import DAG
from snakemake.jobs import Job


async def leave_files(job, *arguments):
    """Take the place of what removes a job's output files."""


async def find_outdated(dag):
    """Force the jobs whose artifacts are not the planned ones, in place of the check for marks of interrupted jobs."""
    dag.workflow.dag_settings.rerun_triggers = frozenset()
    if not dag.workflow.is_main_process:
        return
    for job in dag.jobs:
        reason = PLAN.outdated(job.output.manifest.removeprefix(f"{ROOT}/")) if job.output else None
        if reason:
            dag.forcefiles.add(job.output.manifest)
            print(f"{reason.removesuffix('.')}: made again.", file=sys.stderr)
    if dag.workflow.executor_plugin and not (dag.workflow.dryrun or dag.workflow.touch):
        PLAN.write()


Job.remove_existing_output = Job.cleanup = leave_files
DAG.check_incomplete = find_outdated
