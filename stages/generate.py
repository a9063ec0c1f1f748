"""Let a teacher answer the prompts of a corpus: the text for sequence-level distillation, a corpus like any other."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from stages.generation.prompts import Encoded, Prompt
    from stages.models.description import Description
    from stages.tokenization import ByteView

ROWS = 1000  # of the prompts' held-out examples that are copied at once


def main(argv: list[str] | None = None) -> None:
    """Write train.parquet (prompts and answers), heldout.parquet (the prompts' own) and generations.parquet.

    Batches are fixed by the prompts alone, and each is kept in the checkpoint folder when it is done: a job that was
    killed goes on with the rows that are missing, and gives the same bytes.
    """
    job = stage.parse("stages.generate", __doc__, argv)
    from stages.tokenization import ByteView

    view = ByteView.load(job.inputs["tokenizer"]["path"].parent)
    prompts, encoded, facts = open_prompts(job, view)
    teacher = open_teacher(job, view, prompts, encoded)
    folder = job.checkpoints()
    rows = generate(job, view, teacher, prompts, encoded, folder)
    with job.publish() as draft:
        publish(job, draft, prompts, rows, facts)
    shutil.rmtree(folder, ignore_errors=True)


def open_prompts(job: stage.Job, view: "ByteView") -> "tuple[list[Prompt], Encoded, dict[str, int]]":
    """Return the prompts, their tokens and how many examples gave none; UserError when none does."""
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_table
    from stages.generation.prompts import encode_prompts, prompts_of
    from stages.tokenization.batches import refuse_inexact

    table = read_table(job.data("corpus", "train.parquet"), EXAMPLES).to_pylist()
    found = [prompts_of(row, job.spec["prompt_bytes"]) for row in table]
    prompts = [prompt for part in found for prompt in part]
    if not prompts:
        raise UserError(
            f"{job.inputs['corpus']['name']} has no prompts: no answer of a chat is trained on, and no text is longer "
            f"than prompt_bytes ({job.spec['prompt_bytes']}); change its train_on, or lower prompt_bytes."
        )
    encoded = encode_prompts(view, prompts, job.spec.get("enable_thinking"))
    refuse_inexact(encoded.exact, [prompt.source_id for prompt in prompts], view.name)
    facts = {"examples_without_prompt": sum(not part for part in found), "inexact": int((~encoded.exact).sum())}
    return prompts, encoded, facts


def open_teacher(job: stage.Job, view: "ByteView", prompts: "list[Prompt]", encoded: "Encoded") -> "Description":
    """Return the teacher, ready to generate; UserError when it cannot read a prompt and its answer.

    Its logits must be finite, and its positions enough.
    """
    import torch

    from stages.models.description import describe, usable
    from stages.models.loading import load_model, teacher_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, answer = job.spec["model"]["name"], job.spec["sampling"]["max_new_tokens"]
    model = load_model(job.spec["model"], job.inputs.get("model"), teacher_dtype(job.spec["dtype"], device))
    model = model.to(device).eval().requires_grad_(False)
    view = usable(view, model, name)
    teacher = describe(model, name, view.vocab_size, view.name)
    teacher.cut_padding()
    limit = teacher.positions
    longest = max(range(len(prompts)), key=lambda place: len(encoded.ids[place]))
    length = len(encoded.ids[longest])
    if limit and length + answer > limit:
        raise UserError(
            f"The prompt of example {prompts[longest].source_id} has {length} tokens, and with max_new_tokens {answer} "
            f"more it is longer than the {limit} that model {name!r} takes: lower max_new_tokens"
            + (" or prompt_bytes." if prompts[longest].plain else ", or the max_bytes of the prompts' corpus.")
        )
    logits = model(torch.from_numpy(encoded.ids[longest][None]).long().to(device)).logits
    if not torch.isfinite(logits).all():
        raise UserError(
            f"Teacher {name!r} gives logits that are not finite: its weights are damaged, or it overflows in "
            f"{model.dtype} (try signals.dtype: float32)."
        )
    return teacher


def generate(
    job: stage.Job,
    view: "ByteView",
    teacher: "Description",
    prompts: "list[Prompt]",
    encoded: "Encoded",
    folder: Path,
) -> list[dict[str, Any]]:
    """Return a row of GENERATIONS for each exact prompt, in their order.

    Batches that `folder` holds already are read from there.
    """
    import numpy as np
    import pyarrow as pa
    from tqdm import tqdm

    from stages.artifacts.schemas import GENERATIONS
    from stages.artifacts.tables import read_table, write_table
    from stages.generation.prompts import stopping_ids
    from stages.models import configuration
    from stages.tokenization.batches import length_batches

    sampling = job.spec["sampling"]
    endings = ending_ids(view, configuration.endings(teacher.model))
    ends = sorted(stopping_ids(view, endings))
    configuration.set_generation(teacher.model, sampling["max_new_tokens"], ends, view.pad_id)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(ids) + sampling["max_new_tokens"] for ids in encoded.ids]) * encoded.exact
    done: dict[int, dict[str, Any]] = {}
    with tqdm(total=int(encoded.exact.sum()), unit=" answers") as progress:
        for number, batch in enumerate(length_batches(lengths, job.spec["batch_tokens"])):
            path = folder / f"batch-{number:06d}.parquet"
            if not path.exists():
                rows = generate_rows(job, view, teacher, prompts, encoded, batch, endings)
                partial = path.with_suffix(".partial")
                write_table(partial, pa.Table.from_pylist(rows, schema=GENERATIONS), job.identity)
                os.replace(partial, path)
            done |= zip(batch.tolist(), read_table(path, GENERATIONS).to_pylist(), strict=True)
            progress.update(len(batch))
    return [done[place] for place in sorted(done)]


def generate_rows(
    job: stage.Job,
    view: "ByteView",
    teacher: "Description",
    prompts: "list[Prompt]",
    encoded: "Encoded",
    batch: "np.ndarray",
    endings: frozenset[int],
) -> list[dict[str, Any]]:
    """Return the rows of one batch, `batch` being places of prompts."""
    import numpy as np

    from stages.core.seeds import seed_of
    from stages.generation.prompts import answer_of, stopping_ids
    from stages.generation.sampling import generate_batch

    sampling, uniforms = job.spec["sampling"], None
    if sampling["do_sample"]:
        # Numbers of its own for each prompt, whatever batch it is in.
        seeds = [seed_of(job.spec["seed"], "generate", prompts[place].document_id) for place in batch]
        drawn = [np.random.Generator(np.random.Philox(seed)).random(sampling["max_new_tokens"]) for seed in seeds]
        uniforms = np.stack(drawn)
    found = generate_batch(teacher, [encoded.ids[place] for place in batch], sampling, uniforms)
    rows, stopping = [], stopping_ids(view, endings)
    for place, ids in zip(batch.tolist(), found.tolist(), strict=True):
        stop = next((k + 1 for k, i in enumerate(ids) if i in stopping), len(ids))
        text, reason = answer_of(view, ids[:stop], endings, encoded.leads[place])
        kept = bool(text) and (reason == "stop" or not job.spec["drop_truncated"])
        prompt = prompts[place]
        rows.append(
            {
                "document_id": prompt.document_id,
                "source_id": prompt.source_id,
                "answer": text,
                "finish_reason": reason,
                "kept": kept,
                "prompt_tokens": len(encoded.ids[place]),
                "output_ids": ids[:stop],
            }
        )
    return rows


def ending_ids(view: "ByteView", own: list[int]) -> frozenset[int]:
    """Return the tokens that end an answer: those of the tokenizer's roles, and those that the model names, `own`."""
    roles = [view.roles[role] for role in ("eos", "end_of_turn", "header", "bos") if role in view.roles]
    return frozenset(i for i in (*roles, *own) if i < view.vocab_size)


def publish(
    job: stage.Job, draft: Any, prompts: "list[Prompt]", rows: list[dict[str, Any]], facts: dict[str, int]
) -> None:
    """Write the three tables and the figures; UserError when no answer is left."""
    import pyarrow as pa

    from stages.artifacts.schemas import EXAMPLES, GENERATIONS
    from stages.artifacts.tables import read_batches, write_table
    from stages.corpora.examples import ExampleWriter
    from stages.generation.prompts import answered_rows

    writers = {split: ExampleWriter(draft.folder / f"{split}.parquet", job.identity) for split in ("train", "heldout")}
    prompt_of = {prompt.document_id: prompt for prompt in prompts}
    for row in rows:
        if row["kept"]:
            ended = row["finish_reason"] == "stop"
            prompt = prompt_of[row["document_id"]]
            writers["train"].add(answered_rows(prompt, row["answer"], ended, job.spec["max_bytes"]))
    # Nothing is held out of what a teacher wrote: models are compared on the text of people.
    for batch in read_batches(job.data("corpus", "heldout.parquet"), EXAMPLES, ROWS):
        writers["heldout"].add(batch.to_pylist())
    for split, writer in writers.items():
        writer.close()
        draft.metrics |= {f"{split}_{name}": value for name, value in writer.counts().items()}
        draft.describe[f"{split}.parquet"] = {"rows": writer.examples}
    write_table(draft.folder / "generations.parquet", pa.Table.from_pylist(rows, schema=GENERATIONS), job.identity)
    draft.describe["generations.parquet"] = {"rows": len(rows)}
    reasons = Counter(row["finish_reason"] for row in rows)
    draft.metrics |= facts | {f"finish_{reason}": reasons[reason] for reason in ("stop", "length", "invalid")}
    draft.metrics |= {
        "kept": sum(row["kept"] for row in rows),
        "empty": sum(not row["answer"] for row in rows),
        "tokens": sum(len(row["output_ids"]) for row in rows),
    }
    if not writers["train"].examples:
        raise UserError(
            f"{job.manifest}: of {len(rows)} answers {reasons['length']} reach max_new_tokens "
            f"({job.spec['sampling']['max_new_tokens']}) and {draft.metrics['empty']} are empty, which leaves nothing "
            "to train on: raise max_new_tokens, or set drop_truncated: false."
        )


if __name__ == "__main__":
    stage.run(main)
