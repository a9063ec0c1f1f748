"""Measure tokenization bias: what text the token boundaries of one tokenizer rule out and those of the other do not."""

from typing import TYPE_CHECKING

from stages.core import stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from stages.alignment.bias import TokenPairs
    from stages.tokenization import ByteView

ROWS = 512
SIDES = ("teacher", "student")


def main(argv: list[str] | None = None) -> None:
    """Write bias.parquet (schema BIAS), one row per pair; the spec's `pairs` says of which ones.

    chunk_ends: of the pairs that end a chunk somewhere in the corpus; all: of every suffix pair.
    """
    job = stage.parse("stages.tokenizer_bias", __doc__, argv)
    from stages.alignment.bias import SMOOTHING, biases, suffix_pairs

    smoothing = job.spec.get("additive_smoothing_constant", SMOOTHING)
    if not smoothing >= 0:
        raise UserError(f"additive_smoothing_constant is {smoothing}; it must be a number from 0 on.")
    import pyarrow as pa

    from stages.artifacts.schemas import BIAS
    from stages.artifacts.tables import write_table
    from stages.tokenization import ByteView

    views = [ByteView.load(job.inputs[name]["path"].parent) for name in ("teacher_tokenizer", "tokenizer")]
    counts = read_counts(job, views)
    with job.publish() as draft:
        pairs = suffix_pairs(*views) if job.spec["pairs"] == "all" else chunk_ends(job, *views)
        values = biases(*views, counts, pairs, smoothing)
        columns = []
        for view, ids in zip(views, pairs, strict=True):
            columns += [ids, [view.token_bytes[i] for i in ids.tolist()]]
        columns += [*values, *(count[ids] for count, ids in zip(counts, pairs, strict=True))]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, BIAS, strict=True)]
        write_table(draft.folder / "bias.parquet", pa.Table.from_arrays(arrays, schema=BIAS), job.identity)
        draft.describe["bias.parquet"] = {"rows": len(values[0])}
        draft.metrics["pairs"] = len(values[0])
        for name, value in zip(("bias1", "bias2"), values, strict=True):
            draft.metrics[f"mean_{name}"] = round(float(value.mean()), 6) if len(value) else None


def read_counts(job: stage.Job, views: "list[ByteView]") -> "tuple[np.ndarray, np.ndarray]":
    """Return the count of each token id in the corpus, int64 [vocab] of teacher and student."""
    import pyarrow.compute as pc

    from stages.artifacts.schemas import COUNTS
    from stages.artifacts.tables import read_table

    path = job.data("statistics", "counts.parquet")
    table = read_table(path, COUNTS)
    found = [table.filter(pc.equal(table["side"], side))["count"].to_numpy() for side in SIDES]
    for side, view, count in zip(SIDES, views, found, strict=True):
        if len(count) != view.vocab_size:
            raise UserError(
                f"{path} counts {len(count)} tokens of the {side}, whose tokenizer {view.name} has {view.vocab_size}: "
                "give the statistics of these two tokenizers."
            )
    return found[0], found[1]


def chunk_ends(job: stage.Job, teacher: "ByteView", student: "ByteView") -> "TokenPairs":
    """Return the pairs of tokens that end a chunk of the corpus."""
    from tqdm import tqdm

    from stages.alignment.bias import ChunkEnds
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_batches

    ends = ChunkEnds(teacher, student)
    for batch in tqdm(read_batches(job.data("corpus", "train.parquet"), EXAMPLES, ROWS), desc="batches of examples"):
        ends.add(batch["slots"].to_pylist())
    return ends.pairs()


if __name__ == "__main__":
    stage.run(main)
