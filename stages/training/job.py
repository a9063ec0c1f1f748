"""What the two training programs share: the student of a job, and publishing what was trained."""

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from stages.artifacts.schemas import EXAMPLES
from stages.artifacts.tables import read_table
from stages.core import stage
from stages.models.adapters import merged
from stages.models.description import Description, describe, usable
from stages.models.export import copy_tokenizer, save_model
from stages.models.loading import load_model
from stages.tokenization.batches import encode_rows, refuse_inexact, warn_untrained
from stages.training.metrics import write_metrics
from stages.training.modes import prepare_mode
from stages.training.student import Student as Student
from stages.training.trainer import Run, train

if TYPE_CHECKING:
    from stages.tokenization import ByteView

SAMPLE = 2000  # examples encoded at once, and so many to see whether the tokenizer reproduces the text
TEMPLATE_TOKENS = 128  # of one message, generously: header, end, and a default system prompt


def ranks() -> dict[str, int]:
    """Return {"rank", "ranks"} of this process, as accelerate's and torch's launchers set them."""
    return {"rank": int(os.environ.get("RANK", 0)), "ranks": int(os.environ.get("WORLD_SIZE", 1))}


def device() -> str:
    """Return the device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def open_corpus(job: stage.Job, view: "ByteView") -> pa.Table:
    """Return a job's training examples; UserError when the tokenizer does not reproduce the text of the first ones."""
    table = read_table(job.data("corpus", "train.parquet"), EXAMPLES)
    rows = table.slice(0, SAMPLE)
    refuse_inexact(encode_rows(view, rows).exact, rows["example_id"].to_pylist(), view.name)
    warn_untrained(view, rows)
    return table


def open_student(
    job: stage.Job, settings: dict[str, Any], view: "ByteView", table: pa.Table, start: dict[str, Any] | None
) -> tuple[Description, nn.Module, dict[str, Any]]:
    """Return (description, the module to export, what is trained) of a job's student, as `prepare_mode` marks it.

    `start` is the artifact it starts from; without one, the "model" of the spec is loaded.
    """
    model = load_model(job.spec["model"], start)
    view = usable(view, model, job.spec["model"]["name"])
    student = describe(model, job.spec["model"]["name"], view.vocab_size, view.name)
    refuse_long(view, table, student)
    return student, *prepare_mode(student, settings, job.spec["seed"])


def refuse_long(view: "ByteView", table: pa.Table, model: Description) -> None:
    """Refuse a corpus with an example that the model has no positions for.

    A token of text has a byte or more, so only examples of about as many bytes as there are positions are encoded.
    """
    limit = model.positions
    if not limit or not len(table):
        return
    most = table["bytes"].to_numpy() + TEMPLATE_TOKENS * pc.list_value_length(table["slots"]).to_numpy()
    large = np.flatnonzero(most > limit)
    for start in range(0, len(large), SAMPLE):
        rows = table.take(large[start : start + SAMPLE])
        lengths = np.diff(encode_rows(view, rows).offsets)
        at = int(np.argmax(lengths))
        model.check_length(int(lengths[at]), rows["bytes"][at].as_py(), rows["example_id"][at].as_py())


def train_and_publish(
    job: stage.Job, run: Run, outer: nn.Module, student: Description, trained: dict[str, Any]
) -> None:
    """Train, write the Hugging Face model folder in the types it came in, with metrics, and remove the checkpoints."""
    result = train(run)
    if ranks()["rank"] != 0:
        return
    with job.publish() as draft:
        draft.describe["model.safetensors"] = save_model(merged(outer), student.dtypes, draft.folder)
        draft.metrics["auto_tokenizer"] = copy_tokenizer(job.inputs["tokenizer"], draft.folder)
        write_metrics(draft.folder / "metrics.jsonl", result["metrics"])
        timed = ("seconds", "tokens_per_second")
        figures = {key: value for key, value in result["figures"].items() if key not in timed}
        draft.metrics.update(figures, trained=trained, last=result["metrics"][-1] if result["metrics"] else {})
        # What differs between identical runs is no part of the artifact.
        draft.run.update({f"training_{key}": result["figures"][key] for key in timed}, timing=result["timing"])
    shutil.rmtree(run.folder, ignore_errors=True)
