"""What a user can get wrong, tried through the command line: one sentence, non-zero exit, nothing lost."""

import json
import os
import subprocess
import sys

import pytest

from stages.core import artifact, specs
from tests.workflow.conftest import Project, copy_sources

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def sources(repository, tmp_path_factory):
    """An unbuilt copy of the project."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    copy_sources(repository, folder)
    return folder


BASE = {
    "name": "faulty",
    "corpora": {"docs": {"kind": "txt", "path": "text.txt", "max_bytes": 64}},
    "tokenizers": {"bpe": {"train": {"corpus": "docs", "kind": "byte_bpe", "vocab_size": 300}}},
    "models": {"m": {"path": "./model", "tokenizer": "bpe"}},
}


def dry_run(sources, config):
    return Project(sources, config).snakemake("--dry-run")


def test_broken_config_prints_one_sentence_and_no_traceback(sources):
    done = dry_run(sources, BASE | {"experimants": {}})
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "`experimants` is not a key of this section; did you mean `experiments`?" in output
    assert "Traceback" not in output and "KeyError" not in output


def test_missing_model_path(sources):
    (sources / "text.txt").write_text("Some text.\n")
    done = dry_run(sources, BASE | {"experiments": {"e": {"student": "m", "corpus": "docs", "losses": ["sft"]}}})
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "`models.m.path`: the folder ./model does not exist" in output and "Traceback" not in output


def test_two_experiments_with_one_name(sources):
    project = Project(sources, BASE)
    project.config_file.write_text(
        project.config_file.read_text() + "experiments:\n  e: {student: m}\n  e: {student: m}\n"
    )
    done = project.snakemake("--dry-run")
    assert done.returncode != 0
    assert "`e` was already given in line" in done.stdout + done.stderr


def test_job_that_refuses_its_input_says_so_on_the_terminal(sources):
    (sources / "text.txt").write_bytes(b"fine\n\xff\xfe broken\n")
    project = Project(sources, BASE)
    done = project.snakemake(f"results/{BASE['name']}/corpora/docs/manifest.json")
    output = done.stdout + done.stderr
    assert done.returncode != 0
    sentences = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "text.txt" in sentences[0] and "UTF-8" in sentences[0], output
    assert "Traceback" not in output


def run_stage(stage, root, manifest, spec):
    command = [sys.executable, "-m", f"stages.{stage}", "--root", str(root), "--manifest", manifest]
    return subprocess.run([*command, "--spec", specs.canonical(spec)], capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB; skipped where mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def corpus_spec(path, max_bytes=512):
    spec = {
        "kind": "txt",
        "files": {str(path): artifact.file_digest(path)},
        "column": None,
        "messages": None,
        "train_on": "all",
        "sample": None,
    }
    return spec | {"max_bytes": max_bytes, "heldout": 0.1, "seed": 1, "inputs": {}}


def test_full_disk_leaves_what_was_there(small_disk, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short text.\n")
    done = run_stage("corpus", small_disk, "corpora/docs/manifest.json", corpus_spec(text))
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in (small_disk / "corpora/docs").iterdir()}
    text.write_bytes(os.urandom(200_000).hex().encode())
    done = run_stage("corpus", small_disk, "corpora/docs/manifest.json", corpus_spec(text))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in (small_disk / "corpora/docs").iterdir()} == before


def test_program_run_with_a_damaged_input_names_the_file(finished, tmp_path):
    """The size is right but the bytes are not Parquet: the reader says which file it is."""
    project = finished.copy(tmp_path / "project")
    path = project.root / "corpora/docs/train.parquet"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)
    node = json.loads((project.root / "corpora/part/manifest.json").read_text())
    done = run_stage("corpus", project.root, "corpora/part/manifest.json", node["spec"])
    assert done.returncode == 2
    assert "train.parquet" in done.stderr and "damaged" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((project.root / "corpora/part/manifest.json").read_text()) == node


def test_heavy_packages_stay_out_of_the_light_stages(repository):
    """A stage that needs no torch starts without it, and so does Snakemake."""
    light = [
        "corpus",
        "tokenizer",
        "tokenizer_stats",
        "mined_mapping",
        "cloze_task",
        "summarize",
        "report",
        "inspect",
        "verify",
    ]
    modules = [f"stages.{name}" for name in light] + ["stages.planning.run"]
    found = "[name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]"
    program = f"import sys, {', '.join(modules)}; print({found})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.strip() == "[]"
