"""Keep a teacher's embedding and output matrices, which some methods read beside its signals."""

from stages.core import stage


def main(argv: list[str] | None = None) -> None:
    """Write head.safetensors; how it makes logits is in the manifest's metrics."""
    job = stage.parse("stages.teacher_head", __doc__, argv)
    import torch

    from stages.models.description import describe, usable
    from stages.models.loading import load_model, teacher_dtype
    from stages.signals.matrices import FILE, save_side
    from stages.tokenization import ByteView

    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(job.spec["model"], job.inputs.get("model"), teacher_dtype(job.spec["dtype"], device))
    view = usable(view, model, job.spec["model"]["name"])
    side = describe(model, job.spec["model"]["name"], view.vocab_size, view.name).side
    with job.publish() as draft:
        draft.metrics.update(save_side(side, draft.folder / FILE))


if __name__ == "__main__":
    stage.run(main)
