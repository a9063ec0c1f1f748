"""Evaluate a model: bits per byte of held-out text, or tasks of the LM Evaluation Harness."""

from typing import Any

from stages.core import stage
from stages.core.errors import UserError

BATCH_TOKENS = 8192


def main(argv: list[str] | None = None) -> None:
    """Read a model and a suite, write `results.json` and the scores of each sample."""
    job = stage.parse("stages.evaluate", __doc__, argv)
    kind = job.spec["suite"]["kind"]
    if kind not in ("bits_per_byte", "lm_eval"):
        raise UserError(f"Unknown suite kind {kind!r}: choose bits_per_byte or lm_eval.")
    import torch

    from stages.core.artifact import write_json
    from stages.embeddings.checkpoint import load_model
    from stages.evaluation.bits_per_byte import model_size

    device = "cuda" if torch.cuda.is_available() else "cpu"
    manager = None
    if kind == "lm_eval":
        from stages.evaluation import harness

        manager = harness.task_manager(job.spec["suite"].get("tasks") or [], job.spec["suite"].get("include_path"))
    with job.publish() as draft:
        model = load_model(job.spec["model"], job.inputs, dtype_for(job.spec["model"].get("dtype"), device)).to(device)
        if kind == "bits_per_byte":
            rows, facts = bits_per_byte(job, model, draft)
        else:
            rows, facts = lm_eval_tasks(job, model, manager, draft)
        facts |= {"model": {"name": job.spec["model"]["name"]} | model_size(model)}
        write_json(draft.folder / "results.json", facts | {"results": rows})
        draft.metrics["results"] = rows


def dtype_for(wanted: str | None, device: str) -> str:
    """Return the dtype to evaluate in: fp32 on a CPU; on a GPU the configured one, bf16 by default."""
    if device == "cpu":
        return "float32"
    return "bfloat16" if wanted in (None, "auto") else wanted


def bits_per_byte(job: stage.Job, model: Any, draft: Any) -> tuple[list[dict], dict[str, Any]]:
    """Score every byte of the held-out examples once; write samples.parquet; return (result rows, facts)."""
    raise NotImplementedError


def lm_eval_tasks(job: stage.Job, model: Any, manager: Any, draft: Any) -> tuple[list[dict], dict[str, Any]]:
    """Run the suite's tasks; write samples.parquet; return (result rows, facts)."""
    import pyarrow as pa
    from transformers import AutoTokenizer

    from stages.artifacts.schemas import TASK_SAMPLES
    from stages.artifacts.tables import write_table
    from stages.evaluation import harness

    suite = job.spec["suite"]
    tokenizer = AutoTokenizer.from_pretrained(job.inputs["tokenizer"]["path"].parent)
    built = [harness.built_task(task["path"].parent, task["spec"]["name"]) for task in job.inputs.get("tasks", [])]
    tasks = [*(suite.get("tasks") or []), *built]
    results = harness.run_tasks(model, tokenizer, tasks, manager, suite, job.spec["seed"])
    samples = pa.Table.from_pylist(harness.sample_rows(results), schema=TASK_SAMPLES)
    write_table(draft.folder / "samples.parquet", samples, job.identity)
    draft.describe["samples.parquet"] = {"rows": samples.num_rows}
    return harness.result_rows(results), {"suite": "lm_eval"}


if __name__ == "__main__":
    stage.run(main)
