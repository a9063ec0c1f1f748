"""What a distillation reads beside its text: teacher signals, the pair of tokenizers, the teacher's matrices.

Everything is refused that was made of other inputs than those of this job.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stages.alignment.chunks import BiasTable
from stages.alignment.pair import Matches, Pair, Projection
from stages.artifacts.schemas import BIAS, MAPPING, PROJECTION, REVERSE_MAPPING
from stages.artifacts.tables import read_table
from stages.core import artifact, stage
from stages.core.errors import UserError
from stages.losses import Needs
from stages.signals.matrices import FILE, load_side
from stages.signals.reader import Signals, open_signals
from stages.tokenization import ByteView
from stages.training.job import device
from stages.vocabulary.head import Side


def check_signals(job: stage.Job, needs: Needs) -> dict[str, Any]:
    """Return the index of the signals; UserError when they are not of this teacher, tokenizer, corpus and boundary."""
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


def open_index(job: stage.Job, index: dict[str, Any], needs: Needs, example_ids: list[str]) -> Signals:
    """Open the shards and check that they hold the corpus's examples, in order."""
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


def teacher_side(job: stage.Job, needs: Needs) -> Side | None:
    """Return the teacher's matrices from their artifact, where a loss reads them and the job has it."""
    if not needs.teacher_head or "teacher_head" not in job.inputs:
        return None
    manifest = job.inputs["teacher_head"]
    return load_side(artifact.data_path(manifest, FILE), manifest["metrics"], torch.device(device()))


def open_pair(job: stage.Job, student: ByteView, needs: Needs) -> Pair:
    """Return the two tokenizers with what the losses read of them."""
    teacher = ByteView.load(job.inputs["teacher_tokenizer"]["path"].parent)
    parts: dict[str, Any] = {}
    if needs.pair & {"mapping", "projection"}:
        refuse_other(job, "mapping", ("teacher_tokenizer", "tokenizer"))
    if "mapping" in needs.pair:
        tables = {"mapping.parquet": MAPPING, "reverse.parquet": REVERSE_MAPPING}
        ours, theirs = (read_table(job.data("mapping", file), schema) for file, schema in tables.items())
        parts["to_teacher"] = matches(ours.slice(0, student.vocab_size), "teacher_id", teacher.vocab_size)
        parts["to_student"] = matches(theirs, "student_id", student.vocab_size)
    if "projection" in needs.pair:
        cells = read_table(job.data("mapping", "projection.parquet"), PROJECTION)
        parts["projection"] = projection(cells, student.vocab_size)
    thresholds = {"bias": "tokenizer_pair_bias_threshold", "side_path_bias": "tokenizer_pair_bias_threshold_side_path"}
    for part, threshold in thresholds.items():
        if part in needs.pair:
            refuse_other(job, "bias", ("teacher_tokenizer", "tokenizer", "corpus"))
            if part == "side_path_bias":
                refuse_few(job)
            parts[part] = open_bias(job, job.spec["loss"][threshold])
    return Pair(teacher, student, **parts)


def refuse_other(job: stage.Job, name: str, made_of: tuple[str, ...]) -> None:
    """Refuse an artifact of the pair that was made of other tokenizers, or another corpus, than this job's."""
    manifest = job.inputs[name]
    for key in made_of:
        if manifest["inputs"][key]["lineage"] != job.inputs[key]["lineage"]:
            raise UserError(
                f"The artifact {manifest['name']} was made with another {key} "
                f"({manifest['inputs'][key]['lineage']}) than {job.inputs[key]['name']} "
                f"({job.inputs[key]['lineage']}): let snakemake make it again."
            )


def refuse_few(job: stage.Job) -> None:
    """Refuse biases of the pairs at chunk ends alone, which say nothing of the other pairs that a mapping has."""
    manifest = job.inputs["bias"]
    if manifest["spec"]["pairs"] != "all":
        raise UserError(
            f"The artifact {manifest['name']} has the biases of pairs at chunk ends only, but side_path_mapping_mode "
            "bias_threshold asks for those of all tokens: set tokenizer_bias.pairs to all and make it again."
        )


def matches(table: pa.Table, target: str, ids: int) -> Matches:
    """Return a table of schema MAPPING or REVERSE_MAPPING, whose rows are in the order of their ids, as arrays.

    `ids`: how many the other side has; what is mapped to one beyond them is mapped to none.
    """
    nearest = np.where(table[target].to_numpy() < ids, table[target].to_numpy(), -1)
    same = np.isin(table["kind"].to_numpy(zero_copy_only=False), ("exact", "special"))
    return Matches(
        exact=np.where(same, nearest, -1),
        prefix=np.where(table["prefix_id"].to_numpy() < ids, table["prefix_id"].to_numpy(), -1),
        nearest=nearest,
        reliable=table["reliable"].to_numpy(zero_copy_only=False),
    )


def projection(cells: pa.Table, vocab: int) -> Projection:
    """Return the cells (schema PROJECTION) of each of `vocab` student ids side by side."""
    student, teacher, weight = (cells[name].to_numpy() for name in PROJECTION.names)
    order = np.argsort(student, kind="stable")
    order = order[student[order] < vocab]
    student, teacher, weight = student[order].astype(np.int64), teacher[order], weight[order]
    counts = np.bincount(student, minlength=vocab)
    place = np.arange(len(student)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.zeros((vocab, max(1, int(counts.max(initial=0)))), np.int64)
    weights = np.zeros(ids.shape, np.float32)
    ids[student, place], weights[student, place] = teacher, weight
    return Projection(ids, weights)


def open_bias(job: stage.Job, threshold: float) -> BiasTable:
    """Return where no chunk may end."""
    columns = ["teacher_id", "student_id", "bias1", "bias2"]
    table = read_table(job.data("bias", "bias.parquet"), BIAS, columns)
    return BiasTable.over(*(table[name].to_numpy() for name in columns), threshold)
