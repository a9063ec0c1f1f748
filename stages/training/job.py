"""What the two training programs share: the student of a job, and publishing what was trained."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core import artifact, stage
from stages.core.errors import UserError
from stages.training import checkpoints as checkpoints
from stages.training.models import Head, check_length, find_head, load_model, stored_dtype
from stages.training.modes import merged, prepare_mode
from stages.training.student import Student as Student
from stages.training.trainer import Run, train, write_metrics

if TYPE_CHECKING:
    from stages.tokenization import ByteView

SAMPLE = 2000  # examples encoded before training to see whether the tokenizer reproduces them and fits the model
INEXACT_LIMIT = 0.01
TOKENIZER_ONLY = ("tokens.parquet", "byte_view.json")  # files of a tokenizer artifact that transformers does not read


def ranks() -> dict[str, int]:
    """Return {"rank", "ranks"} of this process, as accelerate's and torch's launchers set them."""
    return {"rank": int(os.environ.get("RANK", 0)), "ranks": int(os.environ.get("WORLD_SIZE", 1))}


def device() -> str:
    """Return the device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def refuse_inexact(view: "ByteView", table: pa.Table) -> None:
    """Refuse a tokenizer that does not reproduce the text of more than 1 % of the first examples."""
    rows = table.slice(0, SAMPLE)
    exact = view.encode_examples(rows["slots"].to_pylist(), rows["ends_document"].to_pylist()).exact
    inexact = int((~exact).sum())
    if inexact > INEXACT_LIMIT * len(exact):
        first = rows["example_id"][int(np.argmin(exact))].as_py()
        raise UserError(
            f"Tokenizer {view.name!r} does not reproduce the text of {inexact} of the first {len(exact)} examples, "
            f"{first} first: choose a tokenizer with byte fallback, or leave such text out of the corpus."
        )


def open_student(
    job: stage.Job, settings: dict[str, Any], view: "ByteView", table: pa.Table, start: dict[str, Any] | None
) -> tuple[PreTrainedModel, nn.Module, Head]:
    """Return (model, the module to export, head) of a job's student, marked for training.

    `start` is the artifact it starts from; without one, the "model" of the spec is loaded.
    """
    model = load_model(job.spec["model"], start, None)
    name = job.spec["model"]["name"]
    head = find_head(model, view.vocab_size, name, view.name)
    longest(view, table, model, name)
    return model, prepare_mode(model, settings, job.spec["seed"]), head


def longest(view: "ByteView", table: pa.Table, model: PreTrainedModel, name: str) -> None:
    """Refuse a corpus with an example that the model has no positions for; the largest in bytes are tried."""
    if not len(table):
        return
    largest = np.argsort(-table["bytes"].to_numpy(), kind="stable")[:SAMPLE]
    rows = table.take(largest)
    lengths = np.diff(view.encode_examples(rows["slots"].to_pylist(), rows["ends_document"].to_pylist()).offsets)
    at = int(np.argmax(lengths))
    check_length(model, name, int(lengths[at]), rows["bytes"][at].as_py(), rows["example_id"][at].as_py())


def train_and_publish(job: stage.Job, run: Run, outer: nn.Module) -> None:
    """Train, write the Hugging Face model folder with its metrics, and remove the checkpoints."""
    result = train(run)
    if ranks()["rank"] != 0:
        return
    with job.publish() as draft:
        dtype = export_dtype(job)
        draft.describe["model.safetensors"] = export(merged(outer), dtype, draft.folder)
        copy_tokenizer(job.inputs["tokenizer"], draft.folder)
        write_metrics(draft.folder / "metrics.jsonl", result["metrics"])
        timed = ("seconds", "tokens_per_second")
        figures = {key: value for key, value in result["figures"].items() if key not in timed}
        draft.metrics.update(figures, last=result["metrics"][-1] if result["metrics"] else {})
        # What differs between identical runs is no part of the artifact.
        draft.run.update({f"training_{key}": result["figures"][key] for key in timed}, timing=result["timing"])
    shutil.rmtree(run.folder, ignore_errors=True)


def export_dtype(job: stage.Job) -> torch.dtype:
    """Return the type the finished model is stored in: that of the model it started from."""
    start = job.inputs.get("init")
    if start is None and not job.spec.get("model", {}).get("path"):
        return torch.float32
    place = start["path"].parent if start else job.spec["model"]["path"]
    return stored_dtype(place, None if start else job.spec["model"].get("revision"))


def export(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Write `config.json`, `generation_config.json` and one `model.safetensors`; return facts on the weights."""
    model = model.to("cpu", dtype)
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size="100TB")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = list(model.get_input_embeddings().weight.shape)
    return {"parameters": parameters, "dtype": str(dtype).removeprefix("torch."), "embedding": embedding}


def copy_tokenizer(manifest: dict[str, Any], folder: Path) -> None:
    """Copy the files that transformers reads from a tokenizer artifact into `folder`."""
    for name in manifest["data"]:
        if name not in TOKENIZER_ONLY:
            shutil.copyfile(artifact.data_path(manifest, name), folder / name)
