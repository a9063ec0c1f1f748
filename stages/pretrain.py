"""Train a small language model from scratch: the demo's stand-in for a pretrained one."""

from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.tokenization import ByteView


def main(argv: list[str] | None = None) -> None:
    """Make a random model of the given architecture, train it by next-token prediction, publish it."""
    job = stage.parse("stages.pretrain", __doc__, argv)
    from stages.losses import Loss, sft
    from stages.models.description import describe
    from stages.tokenization import ByteView
    from stages.training import job as training
    from stages.training.data import Collator
    from stages.training.modes import prepare_mode
    from stages.training.trainer import Run, prepare_losses
    from stages.vocabulary.head import Sides

    settings = settings_of(job.spec["train"])
    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    table = training.open_corpus(job, view)
    model = random_model(job.spec["architecture"], view, job.spec["seed"])
    described = describe(model, job.stage, view.vocab_size, view.name)
    training.refuse_long(view, table, described)
    outer, trained = prepare_mode(described, settings, job.spec["seed"])
    losses = [Loss("sft", sft, {}, 1.0)]
    collate = Collator(
        table,
        view,
        None,
        None,
        lambda examples: prepare_losses(losses, examples),
        batch_size=settings["batch_size"],
        max_tokens=settings["max_tokens"],
        seed=job.spec["seed"],
        packs=described.packs,
        **training.ranks(),
    )
    sides = Sides(described.side)
    student = training.Student(model, sides, sft.needs({}).student, None, None)
    run = Run(student, losses, collate, settings, job.spec["seed"], job.checkpoints())
    training.train_and_publish(job, run, outer, described, trained)


def settings_of(train: dict[str, Any]) -> dict[str, Any]:
    """Return the "train" settings with defaults: those of `distill`, but all weights are trained."""
    from stages.training import modes

    return modes.settings_of({"train_model_mode": "full"} | train)


def random_model(architecture: dict[str, Any], view: "ByteView", seed: int) -> "PreTrainedModel":
    """Return a float32 model of `architecture` with weights drawn from `seed`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.configuration import set_special_ids
    from stages.training.data import generator

    fields = dict(architecture)
    kind = fields.pop("model_type", "llama")
    if kind != "llama":
        raise UserError(f"architecture.model_type is {kind!r}; pretrain makes llama models only.")
    specials = {"bos_token_id": view.start_id, "eos_token_id": view.eos_id, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=view.vocab_size, **fields, **specials)
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(seed, "weights").integers(2**63)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Named only now: transformers would make the row of the padding token, often the start token too, zeros.
    set_special_ids(model, view.roles, view.start_id, view.pad_id)
    return model


if __name__ == "__main__":
    stage.run(main)
