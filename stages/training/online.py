"""A teacher at hand: its signals are computed for each micro-batch instead of read from the cache."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from stages.core import stage
from stages.core.seeds import seed_of
from stages.losses import Needs
from stages.losses.examples import Examples
from stages.models.description import describe, usable
from stages.models.loading import load_model, teacher_dtype
from stages.signals.compute import check_finite, teacher_pass, wanted_signals
from stages.tokenization import ByteView
from stages.tokenization.batches import token_places
from stages.training import job as training
from stages.vocabulary.head import Side


def online_teacher(
    job: stage.Job, view: ByteView, needs: Needs, table: pa.Table
) -> tuple[Callable[[Examples], None], Side]:
    """Return (a function that computes the signals of a micro-batch with the teacher itself, the teacher's side)."""
    device = torch.device(training.device())
    name = job.spec["teacher_model"]["name"]
    dtype = teacher_dtype(job.spec["train"].get("dtype", "auto"), device)
    model = load_model(job.spec["teacher_model"], job.inputs.get("teacher"), dtype).to(device).eval()
    model.requires_grad_(False)
    view = usable(view, model, name)
    teacher = describe(model, name, view.vocab_size, view.name)
    training.refuse_long(view, table, teacher)
    kept = {"boundary": "boundary_logprob" in needs.teacher, "eos": "eos_logprob" in needs.teacher}
    mask = view.boundary_mask(job.spec["loss"]["space_mask_mode"])
    seed = seed_of(job.spec["seed"], "samples")
    wanted = wanted_signals(job.spec.get("needs", {}) | kept, mask, view.eos_id, device, seed)

    def ask(examples: Examples) -> None:
        batch = examples.teacher
        assert batch is not None
        order = np.argsort(-np.diff(batch.offsets), kind="stable")
        found = teacher_pass(teacher.body, teacher.head, batch.ids, batch.offsets, order, wanted)
        places = token_places(batch.offsets, order)
        for column, values in found.items():
            examples.signals[column] = np.empty_like(values)
            examples.signals[column][places] = values
        check_finite(examples.signals, batch.offsets, [str(i) for i in range(len(order))], name)

    return ask, teacher.side
