"""Train a student on a corpus with the losses of an experiment, from teacher signals or a teacher at hand."""

from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError
from stages.core.seeds import seed_of

if TYPE_CHECKING:
    import torch

    from stages.alignment.pair import Pair
    from stages.losses import Loss, Needs
    from stages.vocabulary.head import Sides


def main(argv: list[str] | None = None) -> None:
    """Check settings and signals, train, and publish the model."""
    job = stage.parse("stages.distill", __doc__, argv)
    losses = import_losses(job.spec)
    needs = joint_needs(losses)

    from stages.models.description import usable
    from stages.tokenization import ByteView
    from stages.training import inputs
    from stages.training import job as training
    from stages.training.data import Collator
    from stages.training.modes import settings_of
    from stages.training.online import online_teacher
    from stages.training.trainer import Run, prepare_losses
    from stages.vocabulary.head import Sides

    settings = settings_of(job.spec["train"])
    index = inputs.check_signals(job, needs) if needs.teacher and job.spec["teacher"] == "cached" else None
    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    table = training.open_corpus(job, view)
    signals = inputs.open_index(job, index, needs, table["example_id"].to_pylist()) if index else None

    online = bool(needs.teacher) and signals is None
    described, outer, trained = training.open_student(job, settings, view, table, job.inputs.get("init"))
    view = usable(view, described.model, described.name)
    pair = inputs.open_pair(job, view, needs) if needs.teacher else None
    ask, teacher = None, inputs.teacher_side(job, needs)
    if online:
        ask, teacher = online_teacher(job, pair.teacher, needs, table)
    sides = Sides(described.side, teacher)
    mode = job.spec.get("loss", {}).get("space_mask_mode", "space+tab+newline+special")
    projectors = make_projectors(losses, sides, pair, job.spec["seed"])
    student = training.Student(described.model, sides, needs.student, view.boundary_mask(mode), view.eos_id, projectors)
    collate = Collator(
        table,
        view,
        pair,
        signals,
        None if online else (lambda examples: prepare_losses(losses, examples)),
        batch_size=settings["batch_size"],
        max_tokens=settings["max_tokens"],
        seed=job.spec["seed"],
        packs=described.packs,
        **training.ranks(),
    )
    run = Run(student, losses, collate, settings, job.spec["seed"], job.checkpoints(), ask)
    training.train_and_publish(job, run, outer, described, trained)


def import_losses(spec: dict[str, Any]) -> "list[Loss]":
    """Import the loss modules that the settings name and let them check their settings."""
    from importlib import import_module

    from stages.losses import Loss
    from stages.training.aggregation import check_schedule

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
        schedule = check_schedule(entry["name"], entry.get("schedule", "constant"))
        losses.append(Loss(entry["name"], module, options, float(entry.get("weight", 1.0)), schedule))
    return losses


def joint_needs(losses: "list[Loss]") -> "Needs":
    """Return what all losses read together."""
    from stages.losses import Needs

    parts = [loss.module.needs(loss.options) for loss in losses]
    joint = {key: frozenset().union(*(getattr(part, key) for part in parts)) for key in ("teacher", "student", "pair")}
    return Needs(**joint, teacher_head=any(part.teacher_head for part in parts))


def make_projectors(
    losses: "list[Loss]", sides: "Sides", pair: "Pair | None", seed: int
) -> "dict[str, torch.nn.Module]":
    """Return the weights that losses have of their own, by the loss's name."""
    import torch

    made = {}
    for loss in losses:
        if hasattr(loss.module, "projectors"):
            source = torch.Generator().manual_seed(seed_of(seed, "projectors", loss.name) % 2**63)
            made[loss.name] = loss.module.projectors(loss.options, sides, source, pair)
    return made


if __name__ == "__main__":
    stage.run(main)
