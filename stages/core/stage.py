"""The command line that every program shares.

    python -m stages.corpus --root results/demo --manifest corpora/python-docs/manifest.json \\
        --spec '{"inputs":{},"kind":"python_docs",...}' --code 3f... --lineage 9a...

`--spec` is the canonical JSON of all settings the stage may see. Its "inputs" name the upstream artifacts by
their manifest, relative to `--root`, with the lineage that this run expects of each:
{"corpus": {"manifest": "corpora/python-docs/manifest.json", "lineage": "..."}}, or a list of such entries.
"""

import argparse
import errno
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.core import artifact, code, specs
from stages.core.errors import UserError, reason_of

_log: Path | None = None  # the file that this process writes to instead of the terminal


@dataclass(frozen=True)
class Job:
    """One run of one stage: its settings, and the places of its inputs and outputs."""

    stage: str
    root: Path
    manifest: Path
    spec: dict[str, Any]
    code: str
    lineage: str
    inputs: dict[str, Any]
    started: float = field(default_factory=time.time)

    def publish(self) -> AbstractContextManager[artifact.Draft]:
        """Return the context in which the stage writes its files; see `artifact.publish`."""
        return artifact.publish(
            self.manifest,
            stage=self.stage,
            spec=self.spec,
            code=self.code,
            lineage=self.lineage,
            inputs=self.inputs,
            started=self.started,
        )

    def data(self, name: str, file: str) -> Path:
        """Return the path of `file` in the input called `name`, checked to be as long as it was written."""
        return artifact.data_path(self.inputs[name], file)

    def checkpoints(self) -> Path:
        """Return the undeclared folder for the checkpoints of this very run."""
        return self.root / ".checkpoints" / self.lineage

    @property
    def identity(self) -> dict[str, str]:
        """What a Parquet file of this job carries in its key-value metadata."""
        return {"stage": self.stage, "lineage": self.lineage, "spec": specs.canonical(self.spec)}


def parse(module: str, description: str | None, argv: list[str] | None = None) -> Job:
    """Parse the command line, check the code digest and open every input manifest. No heavy import happens here.

    `module` is the stage's dotted name, "stages.corpus". UserError when the code is not the planned code, an
    input is missing or an input is not the one this run expects. A planned run (`--code`) whose artifact is already
    there ends here, with success: what it is made from was built again and came out the same.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--root", type=Path, required=True, help="folder of all artifacts, such as results/demo")
    parser.add_argument("--manifest", required=True, help="the manifest to write, relative to --root")
    parser.add_argument("--spec", required=True, help="settings of this stage as JSON, or @FILE")
    parser.add_argument("--code", help="code digest that the run was planned with; checked when given")
    parser.add_argument("--lineage", help="identity the artifact will carry; default: computed from spec and code")
    parser.add_argument("--log", type=Path, help="file for all output; without it, the terminal")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() and not arguments.log else "5")
    # Threads that spin while they wait make torch four times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.log:
        _redirect(arguments.log)
    logger = logging.getLogger("stages")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Stderr()]
    try:
        text = arguments.spec
        spec = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
        inputs = spec["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError('--spec must be a JSON object with an "inputs" object in it.') from None
    try:
        actual = code.code_digest(module, *spec.get("code_modules", []))
    except FileNotFoundError as error:
        raise UserError(f"--spec names code_modules that do not exist ({error}); correct the name.") from None
    if arguments.code and arguments.code != actual:
        raise UserError(
            f"The code of {module} is {actual} but the run was planned with {arguments.code}: it was edited meanwhile; "
            "start snakemake again to plan with the new code."
        )
    opened = {name: _open(arguments.root, entry) for name, entry in inputs.items()}
    lineage = arguments.lineage or specs.lineage(specs.canonical(spec), actual)
    manifest = arguments.root / arguments.manifest
    if arguments.code and artifact.is_finished(manifest, spec, actual, arguments.root):
        print(f"{manifest} is there, made of the same settings, inputs and code: kept.")
        sys.exit()
    return Job(module.rpartition(".")[2], arguments.root, manifest, spec, actual, lineage, opened)


def run(main: Callable[[], None]) -> None:
    """Run a program's `main` and end the process: one sentence and status 2 for what a user can mend.

    Anything else that a library raises is one sentence too, with status 1; its traceback goes to the log, or to stderr
    where there is none. A reader of the output that has gone (`| head`) and Ctrl-C end the program without a word.
    """
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        status, sentence = 2, str(error)
    except Exception as error:
        if _reader_is_gone():
            sys.exit(128 + signal.SIGPIPE)
        status, sentence = 2, _room_sentence(error)
        if sentence is None:
            traceback.print_exc()
            status, sentence = 1, f"{reason_of(error)}{_place(main)}"
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    if not os.path.sameopenfile(terminal.fileno(), sys.stderr.fileno()):
        print(f"error: {sentence}", file=terminal, flush=True)
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Return whether nobody reads stdout any more; what is left to say then goes nowhere."""
    poll = select.poll()
    poll.register(1, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _place(main: Callable[[], None]) -> str:
    """Return which program failed, and where the traceback is."""
    module = main.__globals__.get("__spec__")
    parts = [f"in {module.name}"] if module else []
    parts += [f"the traceback is in {_log}"] if _log else []
    return f" ({'; '.join(parts)})" if parts else ""


def _room_sentence(error: Exception) -> str | None:
    """Return the sentence for a place that is full or closed to writing; libraries have own types for the first."""
    full = "No space left on device"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        what, where = error.strerror, error.filename or "while writing"
    elif full in str(error):
        what, where = full, "while writing"
    else:
        return None
    return f"{what} ({where}): make room or choose another place, then run again."


def _open(root: Path, entry: Any) -> Any:
    if isinstance(entry, list):
        return [_open(root, item) for item in entry]
    manifest = artifact.read_manifest(root / entry["manifest"], entry["manifest"])
    if entry.get("lineage"):
        artifact.check_lineage(manifest, entry["lineage"])
    return manifest


class _Stderr(logging.StreamHandler):
    """Writes what library modules log to whatever standard error is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        print(self.format(record), file=sys.stderr, flush=True)


def _redirect(log: Path) -> None:
    """Send this process's output, that of its libraries included, to a file; under a launcher, all ranks share it."""
    global _log
    _log = log
    log.parent.mkdir(parents=True, exist_ok=True)
    is_first = os.environ.get("RANK", "0") == "0"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if is_first else 0), 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
