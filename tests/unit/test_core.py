"""Identities, manifests and the command line that every stage shares."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core import artifact, code, specs, stage
from stages.core.errors import UserError


@pytest.fixture
def project(tmp_path):
    """A project with one stage that imports one library module."""
    for folder in ("stages", "stages/lib"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "stages/work.py").write_text(
        '"""Doc."""\nfrom stages.lib import used\n\n\ndef main():\n    """Do."""\n    return used.f()\n'
    )
    (tmp_path / "stages/lib/used.py").write_text("def f():\n    return 1\n")
    (tmp_path / "stages/lib/unused.py").write_text("x = 1\n")
    return tmp_path


CODE_CHANGES = [
    ("stages/work.py", lambda text: text + "# a comment\n", False),
    ("stages/work.py", lambda text: text.replace('"""Do."""', '"""Do it."""'), False),
    ("stages/work.py", lambda text: text.replace("    return", "\n    return"), False),
    ("stages/work.py", lambda text: text.replace("used.f()", "used.f() + 1"), True),
    ("stages/lib/used.py", lambda text: text.replace("1", "2"), True),
    ("stages/lib/unused.py", lambda text: text.replace("1", "2"), False),
    ("stages/lib/__init__.py", lambda text: "x = 1\n", True),
]


@pytest.mark.parametrize(("file", "edit", "differs"), CODE_CHANGES)
def test_code_digest_sees_real_changes_only(project, file, edit, differs):
    before = code.code_digest("stages.work", root=project)
    path = project / file
    path.write_text(edit(path.read_text()))
    os.utime(path, ns=(1, 1))
    assert (code.code_digest("stages.work", root=project) != before) is differs


def test_code_digest_covers_imports_inside_functions(project):
    path = project / "stages/work.py"
    path.write_text("def main():\n    from stages.lib.unused import x\n    return x\n")
    before = code.code_digest("stages.work", root=project)
    (project / "stages/lib/unused.py").write_text("x = 2\n")
    assert code.code_digest("stages.work", root=project) != before


def test_canonical_ignores_order_and_keeps_swapped_values_apart():
    assert specs.canonical({"a": 1, "b": 2}) == specs.canonical({"b": 2, "a": 1})
    assert specs.canonical({"a": 1, "b": 2}) != specs.canonical({"a": 2, "b": 1})
    with pytest.raises(ValueError):
        specs.canonical({"a": float("nan")})


def publish(path, text, fail=False):
    with artifact.publish(path, stage="s", spec={}, code="c", lineage="l", inputs={}) as draft:
        (draft.folder / "data.txt").write_text(text)
        draft.metrics["n"] = len(text)
        if fail:
            raise RuntimeError("killed half-way")


def test_publish_writes_data_then_manifest(tmp_path):
    path = tmp_path / "a" / "manifest.json"
    publish(path, "one")
    manifest = artifact.read_manifest(path)
    assert manifest["metrics"] == {"n": 3} and manifest["data"]["data.txt"]["bytes"] == 3
    assert artifact.data_path(manifest, "data.txt").read_text() == "one"
    assert sorted(file.name for file in path.parent.iterdir()) == ["data.txt", "manifest.json", "run.json"]


def test_two_identical_runs_give_identical_manifests(tmp_path):
    publish(tmp_path / "a" / "manifest.json", "one")
    publish(tmp_path / "b" / "manifest.json", "one")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_failed_publish_leaves_the_earlier_artifact(tmp_path):
    path = tmp_path / "manifest.json"
    publish(path, "one")
    with pytest.raises(RuntimeError):
        publish(path, "other", fail=True)
    assert artifact.data_path(artifact.read_manifest(path), "data.txt").read_text() == "one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.txt", "manifest.json", "run.json"]


def test_abandoned_staging_of_a_killed_process_is_removed(tmp_path):
    path = tmp_path / "manifest.json"
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import os, signal
from pathlib import Path
from stages.core import artifact
with artifact.publish(Path({str(path)!r}), stage="s", spec={{}}, code="c", lineage="l", inputs={{}}) as draft:
    (draft.folder / "data.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
""",
        ]
    )
    assert process.returncode == -9 and not path.exists() and len(list(tmp_path.iterdir())) == 1
    publish(path, "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.txt", "manifest.json", "run.json"]


def test_truncated_data_is_refused(tmp_path):
    path = tmp_path / "manifest.json"
    publish(path, "one")
    (tmp_path / "data.txt").write_text("o")
    assert "holds 1 bytes instead of 3" in artifact.damage(path)
    with pytest.raises(UserError, match="holds 1 bytes instead of 3"):
        artifact.data_path(artifact.read_manifest(path), "data.txt")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": 1}'])
def test_damaged_manifest_is_refused(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(UserError, match="manifest"):
        artifact.read_manifest(path)


def test_another_identity_is_refused(tmp_path):
    publish(tmp_path / "manifest.json", "one")
    entry = {"manifest": "manifest.json", "lineage": "other"}
    argv = ["--root", str(tmp_path), "--manifest", "b/manifest.json", "--spec", json.dumps({"inputs": {"x": entry}})]
    with pytest.raises(UserError, match="has identity l but this run expects other"):
        stage.parse("stages.core.stage", None, argv)


def test_other_code_than_planned_is_refused(tmp_path):
    argv = ["--root", str(tmp_path), "--manifest", "m.json", "--spec", '{"inputs":{}}', "--code", "0" * 32]
    with pytest.raises(UserError, match=r"the run was planned with 000.*start snakemake again"):
        stage.parse("stages.core.stage", None, argv)


def test_spec_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="--spec must be a JSON object"):
        stage.parse("stages.core.stage", None, ["--root", str(tmp_path), "--manifest", "m", "--spec", "{"])


def test_user_errors_end_a_program_with_one_sentence(tmp_path):
    program = """
from stages.core import stage
from stages.core.errors import UserError
def main():
    raise UserError("No corpus.")
stage.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: No corpus.\n")


@pytest.mark.parametrize(
    ("raised", "status", "sentence"),
    [
        (
            "OSError(28, 'No space left on device', 'x.parquet')",
            2,
            "error: No space left on device (x.parquet): make room",
        ),
        (
            "RuntimeError('I/O error: No space left on device (os error 28)')",
            2,
            "error: No space left on device (while",
        ),
        ("KeyError('x')", 1, "error: KeyError: 'x'"),
        ("AssertionError()", 1, "error: AssertionError: <string>, line 3:"),
        ("ValueError('one\\n  two') from KeyError('x')", 1, "error: ValueError: one two (KeyError: 'x')"),
        ("BrokenPipeError(32, 'Broken pipe')", 1, "error: BrokenPipeError: [Errno 32] Broken pipe"),
        ("MemoryError()", 1, "error: MemoryError: <string>, line 3:"),
        ("OSError(5, 'Input/output error')", 1, "error: OSError: [Errno 5] Input/output error"),
    ],
)
def test_last_line_of_a_program_says_what_ended_it(tmp_path, raised, status, sentence):
    program = f"from stages.core import stage\ndef main():\n    raise {raised}\nstage.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1].startswith(sentence)


def as_program(folder, body, *arguments, shell="{}"):
    """Run a program that ends as `python -m program` would end."""
    text = f"from stages.core import stage\nimport sys\ndef main():\n    {body}\nif __name__ == '__main__':\n    "
    (folder / "program.py").write_text(text + "stage.run(main)\n")
    command = shell.format(" ".join([sys.executable, "-m", "program", *map(str, arguments)]))
    paths = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[2])])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)


def test_traceback_goes_to_the_log_and_one_sentence_to_the_terminal(tmp_path):
    log = tmp_path / "logs" / "program.log"
    body = "stage.parse('stages.core.stage', None); assert sys is None"
    spec = "'{\"inputs\":{}}'"
    done = as_program(tmp_path, body, "--root", tmp_path, "--manifest", "m.json", "--spec", spec, "--log", log)
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: AssertionError: ") and "assert sys is None" in sentence
    assert f"in program; the traceback is in {log}" in sentence
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and text.splitlines()[-1] == sentence


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("read", [0, 1])
def test_nobody_reads_on(tmp_path, lines, read):
    shell = f"{{}} | head -n {read}; exit ${{{{PIPESTATUS[0]}}}}"
    done = as_program(tmp_path, f"[print(i) for i in range({lines})]", shell=shell)
    expected = {0, 128 + signal.SIGPIPE} if lines == 1 else {128 + signal.SIGPIPE}  # one line fits into the pipe
    assert done.stderr == "" and done.returncode in expected


def test_interrupt_is_quiet(tmp_path):
    done = as_program(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def test_everything_is_written_before_the_old_artifact_goes(tmp_path, monkeypatch):
    """A disk that is full when the manifest is written leaves what was there."""
    path = tmp_path / "manifest.json"
    publish(path, "one")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        publish(path, "other")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def planned(root, **changes):
    """Publish an artifact made of another; the arguments that `outdated` compares it with."""
    publish(root / "a/manifest.json", "one")
    upstream = artifact.read_manifest(root / "a/manifest.json", "a/manifest.json")
    asked = {"spec": {"x": 1, "inputs": {"a": "l"}}, "code": "c"}
    lineage = specs.lineage(specs.canonical(asked["spec"]), "c")
    path = root / "b/manifest.json"
    with artifact.publish(path, stage="s", lineage=lineage, inputs={"a": upstream}, **asked) as draft:
        (draft.folder / "data.txt").write_text("text")
    return {"manifest_path": path, "root": root} | asked | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"spec": {"x": 2, "inputs": {"a": "l"}}}, "made of other settings"),
        ({"spec": {"x": 1, "inputs": {"a": "m"}}}, "made of other inputs"),
        ({"code": "d"}, "made of other code"),
        ({"spec": {"x": 2, "inputs": {}}, "code": "d"}, "made of other settings and inputs and code"),
    ],
)
def test_an_artifact_on_disk_is_the_planned_one_or_says_what_differs(tmp_path, changes, sentence):
    found = artifact.outdated(**planned(tmp_path, **changes))
    assert found is None if sentence is None else sentence in found
    assert artifact.is_finished(**planned(tmp_path, **changes)) is (sentence is None)


def test_files_tell_whether_an_artifact_is_finished(tmp_path, monkeypatch):
    asked = planned(tmp_path)
    (tmp_path / "b/data.txt").write_text("TEXT")
    assert artifact.outdated(**asked) is None and not artifact.is_finished(**asked)
    (tmp_path / "b/data.txt").write_text("text")
    assert artifact.is_finished(**asked)
    publish(tmp_path / "a/manifest.json", "two")
    assert "made of a/manifest.json before that was built again" in artifact.outdated(**asked)
    publish(tmp_path / "a/manifest.json", "one")
    monkeypatch.setattr(artifact, "_versions", lambda: {"torch": "0"})
    assert artifact.outdated(**asked) is None and not artifact.is_finished(**asked)


def test_planned_run_keeps_a_finished_artifact(tmp_path, capsys):
    digest = code.code_digest("stages.core.stage")
    argv = ["--root", str(tmp_path), "--manifest", "m/manifest.json", "--spec", '{"inputs":{}}', "--code", digest]
    job = stage.parse("stages.core.stage", None, argv)
    with job.publish() as draft:
        (draft.folder / "data.txt").write_text("text")
    with pytest.raises(SystemExit) as end:
        stage.parse("stages.core.stage", None, argv)
    assert not end.value.code and "kept" in capsys.readouterr().out
    assert stage.parse("stages.core.stage", None, argv[:-2]).lineage == job.lineage
    (tmp_path / "m/data.txt").write_text("TEXT")
    assert stage.parse("stages.core.stage", None, argv).lineage == job.lineage
