"""What is on disk survives: a dry run changes nothing, and a rebuild that fails or is killed loses nothing."""

import json
import os
import signal

import pytest

from tests.workflow.test_reruns import evaluations, run_in_background, set_config, stages_running, student, wait_for

pytestmark = pytest.mark.workflow

STUDENT = "students/sft"
SLOW = {"steps": 2000, "save_interval": 1}


def content(folder):
    """Every file below a folder with its bytes; what Snakemake writes about its own runs is not ours."""
    return {
        path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and "logs" not in path.parts
    }


def stamps(folder):
    """Every path below a folder with the time and the number of its file."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def train_more(project, **settings):
    train = dict(project.config["experiments"]["sft"]["train"])
    set_config("experiments", "sft", "train", value=train | settings)(project)
    return lambda: set_config("experiments", "sft", "train", value=train)(project)


LOOKS = ("--dry-run", "--lint", "--dag", "--rulegraph", "--filegraph", "--summary", "--list", "--list-resources")


def test_looking_changes_nothing(project):
    """Also after a change of the config, when there would be work to do; --touch leaves the bytes at least."""
    train_more(project, steps=5)
    before, data = stamps(project.root), content(project.root)
    for option in LOOKS:
        project.snakemake(option)
        assert stamps(project.root) == before, option
    project.snakemake("--touch")
    assert content(project.root) == data
    assert project.planned() == student("sft")


def test_back_at_the_old_config_nothing_is_made_again(project):
    back = train_more(project, steps=5)
    assert project.planned() == student("sft")
    back()
    assert project.planned() == set()


def test_dry_run_of_a_new_config_writes_no_results(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    project.config["name"] = "new"
    project.write_config()
    assert project.snakemake("--dry-run").returncode == 0
    assert not (project.folder / "results" / "new").exists()


def test_stage_that_fails_leaves_the_old_artifact(project):
    rows = project.folder / "rows.jsonl"
    text, before = rows.read_text(), content(project.root / "corpora/rows")
    rows.write_text(text + "{broken\n")
    done = project.snakemake()
    assert done.returncode != 0 and "rows.jsonl: line 61 is not JSON" in done.stdout + done.stderr
    assert content(project.root / "corpora/rows") == before
    assert "corpora/rows/manifest.json" in project.planned()
    rows.write_text(text)
    assert project.planned() == set()


@pytest.mark.parametrize("whom", ["stage", "snakemake"])
def test_kill_in_the_middle_leaves_the_old_artifact(project, whom):
    before = content(project.root / STUDENT)
    back = train_more(project, **SLOW)
    process = run_in_background(project, f"results/tiny/{STUDENT}/manifest.json")
    wait_for(lambda: list((project.root / ".checkpoints").glob("*/*")))
    if whom == "snakemake":
        os.killpg(process.pid, signal.SIGKILL)
    for pid in stages_running(project, "distill"):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert content(project.root / STUDENT) == before
    if whom == "snakemake":
        assert project.snakemake("--unlock").returncode == 0
    assert project.planned() == student("sft")
    back()
    assert project.planned() == set()


def test_rebuild_that_succeeds_replaces_the_old_artifact(project):
    before = json.loads((project.root / STUDENT / "manifest.json").read_text())
    train_more(project, steps=5)
    done = project.snakemake(f"results/tiny/{STUDENT}/manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((project.root / STUDENT / "manifest.json").read_text())
    assert after["spec"]["train"]["steps"] == 5 and after["data"] != before["data"]
    assert project.planned() == evaluations("sft") | {"summary/manifest.json", "report.manifest.json"}


def test_what_comes_out_the_same_trains_nothing_again(project):
    """A run in another direction got as far as the corpus: back at the old config the students are still good."""
    rows = project.folder / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("Row number 3 ", "Row number three "))
    assert project.snakemake("results/tiny/corpora/rows/manifest.json").returncode == 0
    rows.write_text(text)
    before = (project.root / "students/local/run.json").read_bytes()
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project.root / "students/local/run.json").read_bytes() == before
    assert "kept" in (project.root / "logs/distill/local.log").read_text()
    assert project.planned() == set()


def test_old_artifact_over_newer_data_is_made_again(project):
    """What a user copied back in parts: the manifest of one run, the inputs of another."""
    manifest = project.root / "tokenizers/local/manifest.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(value | {"metrics": {"touched": True}}))
    assert {"students/local/manifest.json", "summary/manifest.json"} <= project.planned()
