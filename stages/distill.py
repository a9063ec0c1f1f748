"""Train a student on a corpus with the losses of an experiment, from teacher signals or a teacher at hand."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.losses import Needs
    from stages.signals.reader import Signals
    from stages.tokenization import ByteView
    from stages.training.trainer import Loss


def main(argv: list[str] | None = None) -> None:
    """Check settings and signals, train, and publish the model."""
    job = stage.parse("stages.distill", __doc__, argv)
    losses = import_losses(job.spec)
    needs = joint_needs(losses)
    index = check_signals(job, needs) if needs.teacher and job.spec["teacher"] == "cached" else None

    from stages.tokenization import ByteView
    from stages.training import job as training
    from stages.training.data import Collator
    from stages.training.modes import settings_of
    from stages.training.trainer import Run, prepare_losses

    settings = settings_of(job.spec["train"])
    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    table = training.open_corpus(job, view)
    teacher_view = ByteView.load(job.inputs["teacher_tokenizer"]["path"].parent) if needs.teacher else None
    signals = open_index(job, index, needs, table["example_id"].to_pylist()) if index else None

    online = bool(needs.teacher) and signals is None
    model, outer, head, dtype = training.open_student(job, settings, view, table, job.inputs.get("init"))
    mode = job.spec.get("loss", {}).get("space_mask_mode", "space+tab+newline+special")
    student = training.Student(model, head, needs.student, view.boundary_mask(mode), view.eos_id)
    collate = Collator(
        table,
        view,
        teacher_view,
        signals,
        None if online else (lambda examples: prepare_losses(losses, examples)),
        batch_size=settings["batch_size"],
        max_tokens=settings["max_tokens"],
        seed=job.spec["seed"],
        **training.ranks(),
    )
    ask = online_teacher(job, teacher_view, needs, table) if online else None
    run = Run(student, losses, collate, settings, job.spec["seed"], job.checkpoints(), ask)
    training.train_and_publish(job, run, outer, dtype)


def import_losses(spec: dict[str, Any]) -> "list[Loss]":
    """Import the loss modules that the settings name and let them check their settings."""
    from importlib import import_module

    from stages.training.trainer import Loss

    losses = []
    for entry in spec["losses"]:
        if not entry["module"].startswith("stages.losses."):
            raise UserError(
                f"Loss {entry['name']!r} names the module {entry['module']!r}; it must be in stages.losses."
            )
        try:
            module = import_module(entry["module"])
        except ModuleNotFoundError:
            raise UserError(
                f"Loss {entry['name']!r} names the module {entry['module']!r}, which does not exist."
            ) from None
        options = spec.get("loss", {}) | entry | {"kind": entry.get("kind") or entry.get("chunks")}
        module.check(options)
        losses.append(Loss(entry["name"], module, options, float(entry.get("weight", 1.0))))
    return losses


def joint_needs(losses: "list[Loss]") -> "Needs":
    """Return what all losses read together."""
    from stages.losses import Needs

    parts = [loss.module.needs(loss.options) for loss in losses]
    teacher = frozenset().union(*(part.teacher for part in parts))
    return Needs(teacher, frozenset().union(*(part.student for part in parts)))


def check_signals(job: stage.Job, needs: "Needs") -> dict[str, Any]:
    """Return the index of the signals; UserError when they are not of this teacher, tokenizer, corpus and boundary."""
    from stages.core import artifact

    manifest = job.inputs["signals"]
    where = manifest["name"]
    index = json.loads(artifact.data_path(manifest, "shards.json").read_text(encoding="utf-8"))
    fix = "let snakemake make them again, or give this experiment the signals it names."
    for name, key in (("corpus", "corpus"), ("tokenizer", "teacher_tokenizer")):
        if index[name] != job.inputs[key]["lineage"]:
            raise UserError(
                f"The teacher signals {where} were made with another {name} ({index[name]}) than "
                f"{job.inputs[key]['name']} ({job.inputs[key]['lineage']}): {fix}"
            )
    wanted = job.spec["teacher_model"]
    if index["model"] != wanted:
        keys = [key for key in sorted({*wanted, *index["model"]}) if index["model"].get(key) != wanted.get(key)]
        key = "name" if "name" in keys else keys[0]
        raise UserError(
            f"The teacher signals {where} are of another teacher ({key} {index['model'].get(key)!r}) than this "
            f"experiment's ({key} {wanted.get(key)!r}): {fix}"
        )
    mode = job.spec["loss"]["space_mask_mode"]
    if needs.teacher & {"boundary_logprob"} and index["space_mask_mode"] != mode:
        raise UserError(
            f"The teacher signals {where} take {index['space_mask_mode']!r} as boundary tokens, this experiment "
            f"{mode!r}: {fix}"
        )
    for part in index["parts"]:
        missing = needs.teacher - set(part["columns"])
        if missing:
            raise UserError(
                f"The teacher signals {where} lack {', '.join(sorted(missing))}, which the losses of this experiment "
                f"read: {fix}"
            )
    return index


def open_index(job: stage.Job, index: dict[str, Any], needs: "Needs", example_ids: list[str]) -> "Signals":
    """Open the shards and check that they hold the corpus's examples, in order."""
    from stages.signals.reader import open_signals

    home: Path = job.inputs["signals"]["path"].parent
    paths = []
    for part in index["parts"]:
        path = home / part["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != part["bytes"]:
            found = "is missing" if size is None else f"holds {size} bytes instead of {part['bytes']}"
            raise UserError(f"{path} {found}: run `snakemake --cores all`, which builds it again.")
        paths.append(path)
    signals = open_signals(paths, sorted(needs.teacher), job.checkpoints() / "signals")
    if signals.example_ids != example_ids:
        raise UserError(
            f"The teacher signals in {home} hold {signals.count} examples in another order or number than the "
            f"{len(example_ids)} of the corpus: let snakemake make them again."
        )
    return signals


def online_teacher(job: stage.Job, view: "ByteView", needs: "Needs", table: "pa.Table") -> Any:
    """Return a function that computes the signals of a micro-batch with the teacher itself."""
    import numpy as np
    import torch

    from stages.models.loading import load_model
    from stages.signals.compute import check_finite, teacher_pass, wanted_signals
    from stages.tokenization.batches import token_places
    from stages.training import job as training
    from stages.training.data import Examples
    from stages.training.models import body_of, find_head, teacher_dtype

    device = torch.device(training.device())
    name = job.spec["teacher_model"]["name"]
    dtype = teacher_dtype(job.spec["train"].get("dtype", "auto"), device)
    model = load_model(job.spec["teacher_model"], job.inputs.get("teacher"), dtype).to(device).eval()
    model.requires_grad_(False)
    head = find_head(model, view.vocab_size, name, view.name)
    training.refuse_long(view, table, model, name)
    kept = {"boundary": "boundary_logprob" in needs.teacher, "eos": "eos_logprob" in needs.teacher}
    wanted = wanted_signals(kept, view.boundary_mask(job.spec["loss"]["space_mask_mode"]), view.eos_id, device)

    def ask(examples: Examples) -> None:
        batch = examples.teacher
        assert batch is not None
        order = np.argsort(-np.diff(batch.offsets), kind="stable")
        found = teacher_pass(body_of(model), head, batch.ids, batch.offsets, order, wanted)
        places = token_places(batch.offsets, order)
        for column, values in found.items():
            examples.signals[column] = np.empty_like(values)
            examples.signals[column][places] = values
        check_finite(examples.signals, batch.offsets, [str(i) for i in range(len(order))], name)

    return ask


if __name__ == "__main__":
    stage.run(main)
