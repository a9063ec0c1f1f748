"""First light on a cluster: a tiny run through `snakemake --profile slurm` on a real Slurm on this machine."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.cluster import throwaway_slurm
from tests.workflow.conftest import Project, copy_sources

pytestmark = [pytest.mark.slurm, pytest.mark.workflow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = throwaway_slurm.missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with throwaway_slurm.running(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


@pytest.fixture(scope="module")
def on_slurm(cluster, repository, tmp_path_factory):
    """A project whose profile is the shipped one, with the three settings that this cluster needs otherwise."""
    folder = tmp_path_factory.mktemp("on-slurm") / "project"
    copy_sources(repository, folder)
    (folder / "slurm").symlink_to("workflow/profiles/slurm")
    profile = folder / "workflow" / "profiles" / "slurm" / "profile.yaml"
    settings = yaml.safe_load(profile.read_text())
    settings |= {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 5, "latency-wait": 10}
    settings["default-resources"] |= {"runtime": 10}
    profile.write_text(yaml.safe_dump(settings))
    config = yaml.safe_load((repository / "config" / "tiny.yaml").read_text())
    config["corpora"]["docs"]["sample"] = 60
    config["models"]["teacher"]["pretrain"]["train"]["steps"] = 2
    config["experiments"] = {
        "alm": dict(config["experiments"]["alm"], losses=["alm_unconstrained"], loss_weights=[1.0])
    }
    config["experiments"]["alm"]["train"] = dict(config["experiments"]["alm"]["train"], steps=2)
    config["evaluation"] = {
        "models": ["alm"],
        "suites": {"heldout": {"kind": "bits_per_byte", "corpus": "docs", "limit": 10}},
    }
    stages = (
        "pretrain",
        "teacher_signals",
        "initialize",
        "distill",
        "evaluate",
        "corpus",
        "tokenizer",
        "tokenizer_stats",
    )
    config["resources"] = {stage: {"threads": 1, "mem_mb": 1800, "runtime": 10} for stage in (*stages, "mined_mapping")}
    config["resources"]["distill"]["gpu"] = 1
    return Project(folder, config)


def run(project, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", project.config_file.name, *arguments],
        cwd=project.folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_run_to_the_report(on_slurm):
    done = run(on_slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (on_slurm.root / "report.html").stat().st_size > 10_000
    assert "SLURM jobid" in done.stdout + done.stderr
    loss = [json.loads(line) for line in (on_slurm.root / "students/alm/metrics.jsonl").read_text().splitlines()]
    assert loss[-1]["step"] == 2


def test_second_run_has_nothing_to_do(on_slurm):
    done = run(on_slurm, "--dry-run")
    assert "Nothing to be done" in done.stdout + done.stderr
