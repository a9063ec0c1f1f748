"""A copy of the project in which the tiny demo has run, for tests that change one thing and look what follows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

COPIED = ("Snakefile", "stages", "workflow", "config", "envs", "pyproject.toml")


class Project:
    """A private copy of the project with a config of its own."""

    def __init__(self, folder: Path, config: dict):
        self.folder = folder
        self.config_file = folder / "test.yaml"
        self.config = json.loads(json.dumps(config))  # YAML anchors share mappings; changes must not
        self.write_config()
        self.root = folder / "results" / config["name"]

    def write_config(self):
        self.config_file.write_text(yaml.safe_dump(self.config, sort_keys=False))

    def snakemake(self, *arguments, config: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-incomplete", *arguments]
        if config:
            command += ["--configfile", self.config_file.name]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900)

    def planned(self) -> set[str]:
        """Return the manifests that `snakemake` would make now, relative to the results folder."""
        done = self.snakemake("--dry-run")
        assert done.returncode == 0, done.stdout + done.stderr
        blocks = re.findall(
            r"^(?:local)?rule \w+:\n(?:    .*\n)*?    output: (\S+?),? ", done.stdout + done.stderr, re.M
        )
        prefix = f"results/{self.config['name']}/"
        return {block.removeprefix(prefix).removesuffix(",") for block in blocks}

    def copy(self, folder: Path) -> "Project":
        """Return a second project in the same state; times are kept, big files are hard links."""
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=shutil.copy2)
        return Project(folder, yaml.safe_load(self.config_file.read_text()))


def copy_sources(repository: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        else:
            shutil.copy2(source, folder / name)


@pytest.fixture(scope="session")
def finished(repository, tmp_path_factory) -> Project:
    """The tiny demo, run to its end, with one corpus of local rows and one tokenizer from a local folder."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    copy_sources(repository, folder)
    config = yaml.safe_load((repository / "config" / "tiny.yaml").read_text())
    rows = [f'{{"text": "Row number {row} of the local corpus says {row * row}."}}' for row in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    config["corpora"]["rows"] = {"kind": "jsonl", "path": "rows.jsonl", "max_bytes": 256}
    project = Project(folder, config)
    config = project.config
    first = project.snakemake(f"results/{config['name']}/tokenizers/spbpe/manifest.json")
    assert first.returncode == 0, first.stdout + first.stderr
    (folder / "local-tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(project.root / "tokenizers" / "spbpe" / name, folder / "local-tokenizer" / name)
    config["tokenizers"]["local"] = {"source": "./local-tokenizer"}
    config["experiments"]["local"] = {"student": "teacher", "tokenizer": "local", "corpus": "rows", "losses": ["sft"]}
    config["experiments"]["local"]["train"] = dict(config["experiments"]["sft"]["train"])
    config["evaluation"]["models"].append("local")
    project.write_config()
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A fresh copy of the finished project that a test may change."""
    return finished.copy(tmp_path / "project")
