"""Change one thing at a time and compare the exact set of jobs that Snakemake would run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.workflow

REPORT = {"summary/manifest.json", "report.manifest.json"}


def evaluations(*names):
    return {f"evaluations/{name}/{suite}/manifest.json" for name in names for suite in ("heldout", "which")}


def student(name):
    return {f"students/{name}/manifest.json"} | evaluations(name) | REPORT


def set_config(*path, value):
    def change(project):
        place = project.config
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        project.write_config()

    return change


def swap_betas(project):
    train = project.config["experiments"]["sft"]["train"]
    train["b1"], train["b2"] = 0.95, 0.9  # the defaults are 0.9 and 0.95
    project.write_config()


def edit(file, old, new):
    def change(project):
        path = project.folder / file
        text = path.read_text()
        assert old in text, f"{old} is not in {file}"
        path.write_text(text.replace(old, new, 1))

    return change


def comment_everywhere(project):
    for path in (project.folder / "stages").rglob("*.py"):
        path.write_text(path.read_text() + "\n# a comment\n")
    project.config_file.write_text("# a comment\n" + project.config_file.read_text())


def touch_everything(project):
    for path in project.folder.rglob("*"):
        if path.is_file() and ".snakemake" not in path.parts:
            os.utime(path)


def remove(*files):
    def change(project):
        for file in files:
            (project.root / file).unlink()

    return change


def truncate(file):
    def change(project):
        path = project.root / file
        os.truncate(path, path.stat().st_size // 2)

    return change


def new_experiment(project):
    sft = project.config["experiments"]["sft"]
    project.config["experiments"]["space"] = dict(sft, losses=["alm_space"])
    project.config["evaluation"]["models"].append("space")
    project.write_config()


def corrupt_manifest(project):
    (project.root / "corpora/rows/manifest.json").write_text("{")


LOCAL = {"initialized/teacher/local/fvt/manifest.json"} | student("local")
PAIR = "tokenizer_pairs/bytebpe/local"
ALM = student("alm")

CHANGES = {
    "nothing": (lambda project: None, set()),
    "an evaluation setting": (
        set_config("evaluation", "suites", "heldout", "limit", value=30),
        {f"evaluations/{name}/heldout/manifest.json" for name in ("teacher", "fvt", "sft", "alm", "local")} | REPORT,
    ),
    "a loss weight": (set_config("experiments", "alm", "loss_weights", value=[1.0, 0.25]), ALM),
    "two loss weights swapped": (set_config("experiments", "alm", "loss_weights", value=[0.5, 1.0]), ALM),
    "two settings swapped": (swap_betas, student("sft")),
    "a setting of another method": (set_config("experiments", "sft", "binarization_temp", value=7.0), set()),
    "a label": (set_config("experiments", "sft", "label", value="plain"), REPORT),
    "resources": (set_config("resources", "distill", "mem_mb", value=1600), set()),
    "one method's module": (edit("stages/losses/alm.py", "\ndef ", "\nADDED = 1\n\n\ndef "), ALM),
    "a comment in every module": (comment_everywhere, set()),
    "a touch of every file": (touch_everything, set()),
    "a tokenizer file": (
        edit("local-tokenizer/tokenizer_config.json", "{", '{"model_max_length": 4096,'),
        {"tokenizers/local/manifest.json", f"{PAIR}/mapping/manifest.json", f"{PAIR}/statistics/rows/manifest.json"}
        | LOCAL,
    ),
    "a corpus row": (
        edit("rows.jsonl", "Row number 3 ", "Row number three "),
        {"corpora/rows/manifest.json", f"{PAIR}/statistics/rows/manifest.json"} | student("local"),
    ),
    "a new experiment": (new_experiment, student("space")),
    "a deleted intermediate": (
        remove("teachers/teacher/part/part-0001.parquet", "teachers/teacher/part/part-0001.manifest.json"),
        {"teachers/teacher/part/part-0001.manifest.json", "teachers/teacher/part/manifest.json"} | ALM,
    ),
    "deleted data whose manifest is there": (remove("students/sft/model.safetensors"), student("sft")),
    "a truncated file": (truncate("students/alm/model.safetensors"), ALM),
    "a corrupt manifest": (
        corrupt_manifest,
        {"corpora/rows/manifest.json", f"{PAIR}/statistics/rows/manifest.json"} | student("local"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_exactly_these_jobs_run_after(project, name):
    change, expected = CHANGES[name]
    change(project)
    assert project.planned() == expected


def test_lost_records_of_snakemake_hide_no_change(project):
    """Without .snakemake, Snakemake itself compares times only; the identities in the manifests still tell."""
    for path in (project.folder / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            path.unlink()
    assert project.planned() == set()
    set_config("experiments", "alm", "loss_weights", value=[1.0, 0.25])(project)
    assert project.planned() == ALM


def test_job_that_failed_half_way_leaves_nothing_stale(project):
    """After a change, a failed job must not let what was built from the old result pass as up to date."""
    set_config("experiments", "sft", "train", value=dict(project.config["experiments"]["sft"]["train"], steps=5))(
        project
    )
    module = project.folder / "stages" / "distill.py"
    original = module.read_text()
    module.write_text(original.replace("def main(", "raise SystemExit(9)\n\n\ndef main(", 1))
    failed = project.snakemake("results/tiny/students/sft/manifest.json")
    assert failed.returncode != 0
    module.write_text(original)
    assert project.planned() == student("sft")


def run_in_background(project, *arguments):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete", *arguments]
    return subprocess.Popen(
        [*command, "--configfile", project.config_file.name],
        cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def stages_running(project, stage):
    """Return the process ids of a stage's program in this project."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                place = os.readlink(f"/proc/{entry}/cwd")
            except OSError:
                continue
            if f"stages.{stage}".encode() in command and place == str(project.folder):
                found.append(int(entry))
    return found


def test_module_edited_while_the_job_was_queued(project):
    target = f"{PAIR}/statistics/rows/manifest.json"
    remove("corpora/rows/manifest.json", target)(project)
    process = run_in_background(project, f"results/tiny/{target}")
    wait_for(lambda: stages_running(project, "corpus"))
    edit("stages/tokenizer_stats.py", "\ndef ", "\nADDED = 1\n\n\ndef ")(project)
    output = process.communicate()[0]
    assert process.returncode != 0
    assert re.search(r"stages\.tokenizer_stats is \w+ but the run was planned with \w+", output), output
    assert "Traceback" not in output


def test_config_edited_while_the_job_was_queued(project, monkeypatch):
    """A job that starts later reads the plan of its run, not the config of that moment."""
    monkeypatch.chdir(project.folder)
    from stages.planning import run

    monkeypatch.delenv(run.PLAN_VARIABLE, raising=False)
    made = run.start(project.config, [], project.folder)
    made.write()
    set_config("experiments", "alm", "loss_weights", value=[9.0, 9.0])(project)
    assert run.resume() == made
    weights = [loss["weight"] for loss in run.resume().nodes["students/alm/manifest.json"].spec["losses"]]
    assert weights == [1.0, 0.5]


def same_results(project, finished, folder):
    def data(root):
        return json.loads((root / folder / "manifest.json").read_text())["data"]

    return data(project.root) == data(finished.root)


def test_killed_job_gives_the_same_bytes_when_run_again(project, finished):
    remove("corpora/rows/manifest.json")(project)
    process = run_in_background(project, "results/tiny/corpora/rows/manifest.json")
    wait_for(lambda: stages_running(project, "corpus"))
    for pid in stages_running(project, "corpus"):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0 and not (project.root / "corpora/rows/manifest.json").exists()
    assert project.snakemake("results/tiny/corpora/rows/manifest.json").returncode == 0
    assert same_results(project, finished, "corpora/rows")


def test_killed_snakemake_goes_on(project, finished):
    remove("students/sft/manifest.json")(project)
    process = run_in_background(project, "results/tiny/students/sft/manifest.json")
    wait_for(lambda: stages_running(project, "distill"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert project.snakemake("--unlock").returncode == 0
    done = project.snakemake("results/tiny/students/sft/manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_results(project, finished, "students/sft")
