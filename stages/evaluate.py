"""Evaluate a model: bits per byte of held-out text, or tasks of the LM Evaluation Harness."""

import sys
from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from stages.core.artifact import Draft
    from stages.tokenization import EncodedBatch

BATCH_TOKENS = 8192


def main(argv: list[str] | None = None) -> None:
    """Read a model and a suite, write `results.json` and the scores of each sample."""
    job = stage.parse("stages.evaluate", __doc__, argv)
    kind = job.spec["suite"]["kind"]
    if kind not in ("bits_per_byte", "lm_eval"):
        raise UserError(f"Unknown suite kind {kind!r}: choose bits_per_byte or lm_eval.")
    import torch

    from stages.core.artifact import write_json
    from stages.models.loading import load_model, teacher_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    manager = None
    if kind == "lm_eval":
        from stages.evaluation import harness

        manager = harness.task_manager(job.spec["suite"].get("tasks") or [], job.spec["suite"].get("include_path"))
    with job.publish() as draft:
        dtype = teacher_dtype("auto", torch.device(device))
        model = load_model(job.spec["model"], job.inputs.get("model"), dtype).to(device).eval()
        if kind == "bits_per_byte":
            rows, facts = bits_per_byte(job, model, draft)
        else:
            rows, facts = lm_eval_tasks(job, model, manager, draft)
        for note in facts["notes"]:
            print(f"note: {note['task']}: {note['note']}", file=sys.stderr, flush=True)
        write_json(draft.folder / "results.json", facts | {"results": rows})
        draft.metrics |= {key: value for key, value in facts.items() if key != "model"} | {"results": rows}


def bits_per_byte(job: stage.Job, model: "PreTrainedModel", draft: "Draft") -> tuple[list[dict], dict[str, Any]]:
    """Score every byte of the held-out examples once; write samples.parquet; return (result rows, facts).

    Every example starts with the start token (bos, else eos), which is given; an eos at its end is not counted. Of a
    chat, the contents that are trained on count.
    """
    import numpy as np
    import pyarrow as pa

    from stages.artifacts.schemas import EXAMPLES, SCORES
    from stages.artifacts.tables import read_table, write_table
    from stages.evaluation import bits_per_byte as formulas
    from stages.evaluation.results import number
    from stages.evaluation.scoring import token_bits
    from stages.models.description import describe, usable
    from stages.tokenization import ByteView
    from stages.tokenization.batches import refuse_inexact

    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    examples = read_table(job.data("corpus", "heldout.parquet"), EXAMPLES).slice(0, job.spec["suite"].get("limit"))
    if not len(examples):
        raise UserError(
            f"{job.inputs['corpus']['name']} has no held-out examples to score: give the corpus more text or a larger "
            "`heldout`."
        )
    slots = examples["slots"].to_pylist()
    batch = view.encode_examples(slots, examples["ends_document"].to_pylist())
    refuse_inexact(batch.exact, examples["example_id"].to_pylist(), view.name)
    scored = text_tokens(batch)
    if scored[batch.offsets[:-1]].any():
        raise UserError(f"Tokenizer {view.name} has neither a bos nor an eos token: the first token cannot be scored.")
    name, lengths = job.spec["model"]["name"], np.diff(batch.offsets)
    longest = int(lengths.argmax())
    largest, where = examples["bytes"][longest].as_py(), examples["example_id"][longest].as_py()
    view = usable(view, model, name)
    described = describe(model, name, view.vocab_size, view.name)
    described.check_length(int(lengths[longest]), largest, where)
    bits = token_bits(described, batch.ids, batch.offsets, scored, BATCH_TOKENS)
    per_example = np.add.reduceat(np.append(bits, 0.0), batch.offsets[:-1])
    tokens = np.add.reduceat(np.append(scored, False).astype(np.int32), batch.offsets[:-1])
    sizes = scored_bytes(slots, batch, scored)
    known = pa.array(per_example, mask=~np.isfinite(per_example))
    columns = [examples["example_id"], examples["document_id"], sizes, tokens, known]
    table = pa.table(dict(zip(SCORES.names, columns, strict=True)), schema=SCORES)
    write_table(draft.folder / "samples.parquet", table, job.identity)
    draft.describe["samples.parquet"] = {"rows": table.num_rows}
    value, error, documents = formulas.ratio_with_error(per_example, sizes, examples["document_id"].to_pylist())
    flops = formulas.forward_flops_per_token(described, formulas.mean_context(lengths))
    per_byte = float(tokens.sum() / sizes.sum())
    corpus = job.inputs["corpus"]["path"].parent.name
    text = f"the model gives no finite bits to {known.null_count} of {len(known)} examples, so there is no figure"
    facts = {
        "suite": "bits_per_byte",
        "model": described.parameters,
        "notes": [{"task": corpus, "note": text}] if known.null_count else [],
        "bytes": int(sizes.sum()),
        "tokens_per_byte": per_byte,
        "forward_flops_per_byte": flops * per_byte,
        "inexact_examples": int((~batch.exact).sum()),
    }
    row = {"task": corpus, "metric": "bits_per_byte", "filter": "none", "value": number(value), "stderr": number(error)}
    row |= {"n": documents, "higher_is_better": False, "aggregation": "mean", "leads": True}
    return [row], facts


def scored_bytes(slots: list[list[dict[str, Any]]], batch: "EncodedBatch", scored: "np.ndarray") -> "np.ndarray":
    """Return int32 [B]: the bytes of each example's contents that are scored, `scored` bool [N] being their tokens.

    A content that the template leaves out is trained on by its row but has no tokens.
    """
    import numpy as np

    from stages.tokenization.encoding import SLOTS_PER_MESSAGE

    example = np.repeat(np.arange(len(slots)), np.diff(batch.offsets))
    there = set(zip(example[scored].tolist(), (batch.slot[scored] // SLOTS_PER_MESSAGE).tolist(), strict=True))
    sizes = [
        sum(len(slot["text"].encode()) for number, slot in enumerate(row) if (place, number) in there)
        for place, row in enumerate(slots)
    ]
    return np.array(sizes, np.int32)


def text_tokens(batch: "EncodedBatch") -> "np.ndarray":
    """Return bool [N]: the token belongs to a text that is trained on, and not to the template or to an eos."""
    from stages.tokenization.encoding import SLOTS_PER_MESSAGE

    return batch.loss & (batch.slot % SLOTS_PER_MESSAGE == 2)


def lm_eval_tasks(
    job: stage.Job, model: "PreTrainedModel", manager: "TaskManager", draft: "Draft"
) -> tuple[list[dict], dict[str, Any]]:
    """Run the suite's tasks; write samples.parquet; return (result rows, facts)."""
    import pyarrow as pa
    from transformers import AutoTokenizer

    from stages.artifacts.schemas import TASK_SAMPLES
    from stages.artifacts.tables import write_table
    from stages.evaluation import harness
    from stages.models.description import describe, usable
    from stages.tokenization import ByteView

    suite = job.spec["suite"]
    tokenizer = AutoTokenizer.from_pretrained(job.inputs["tokenizer"]["path"].parent)
    name = job.spec["model"]["name"]
    view = usable(ByteView.load(job.inputs["tokenizer"]["path"].parent), model, name)
    described = describe(model, name, view.vocab_size, view.name)
    described.cut_padding()
    built = [harness.built_task(task["path"].parent, task["spec"]["name"]) for task in job.inputs.get("tasks", [])]
    tasks = [*(suite.get("tasks") or []), *built]
    found = harness.run_tasks(described, tokenizer, tasks, manager, suite, job.spec["seed"])
    write_table(draft.folder / "samples.parquet", pa.Table.from_pylist(found.samples, TASK_SAMPLES), job.identity)
    draft.describe["samples.parquet"] = {"rows": len(found.samples)}
    notes = [{"task": task, "note": text} for task, text in found.notes]
    return found.results, {"suite": "lm_eval", "model": described.parameters, "notes": notes}


if __name__ == "__main__":
    stage.run(main)
