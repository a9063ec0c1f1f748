"""Count what two tokenizers make of a corpus: tokens, fertility, vocabulary overlap, aligned chunks."""

import hashlib
from pathlib import Path
from typing import Any

from stages.core import stage

ROWS = 512
DRAWN = 6
DRAWN_BYTES = (24, 160)


def main(argv: list[str] | None = None) -> None:
    """Write counts.parquet (schema COUNTS), summary.json and alignments.json."""
    job = stage.parse("stages.tokenizer_stats", __doc__, argv)
    from tqdm import tqdm

    from stages.alignment.statistics import PairStatistics, drawn_alignment
    from stages.artifacts.schemas import EXAMPLES
    from stages.artifacts.tables import read_batches
    from stages.core.artifact import write_json
    from stages.tokenization import ByteView

    views = [ByteView.load(job.inputs[name]["path"].parent) for name in ("teacher_tokenizer", "tokenizer")]
    statistics = PairStatistics(*views)
    sample = _Sample()
    with job.publish() as draft:
        batches = read_batches(job.data("corpus", "train.parquet"), EXAMPLES, ROWS)
        for batch in tqdm(batches, desc="batches of examples"):
            rows = batch.to_pylist()
            statistics.add([row["slots"] for row in rows])
            sample.add(rows)
        drawn = [
            {"example_id": row["example_id"], "text": "".join(slot["text"] for slot in row["slots"])}
            | drawn_alignment(*views, row["slots"])
            for row in sample.rows
        ]
        summary = statistics.summary()
        write_json(draft.folder / "summary.json", summary)
        write_json(draft.folder / "alignments.json", drawn)
        rows = _write_counts(statistics, draft.folder / "counts.parquet", job.identity)
        draft.describe["counts.parquet"] = {"rows": rows}
        draft.metrics |= {
            "teacher_bytes_per_token": summary["sides"]["teacher"]["bytes_per_token"],
            "student_bytes_per_token": summary["sides"]["student"]["bytes_per_token"],
            "common_tokens": summary["overlap"]["tokens"],
            "one_to_one_chunks": summary["chunks"]["unconstrained"]["shares"]["1-1"],
        }


class _Sample:
    """A few examples to draw: short ones first, then by a hash of their id."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows = sorted(self.rows + rows, key=_rank)[:DRAWN]


def _rank(row: dict[str, Any]) -> tuple[bool, int, bytes]:
    shortest, longest = DRAWN_BYTES
    fits = shortest <= row["bytes"] <= longest
    return not fits, 0 if fits else row["bytes"], hashlib.sha256(row["example_id"].encode()).digest()


def _write_counts(statistics: Any, path: Path, identity: dict[str, str]) -> int:
    import pyarrow as pa

    from stages.artifacts.schemas import COUNTS
    from stages.artifacts.tables import write_table

    tables = []
    for side, view in statistics.views.items():
        size = view.vocab_size
        columns = [[side] * size, range(size), view.token_bytes, statistics.counts[side]]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, COUNTS, strict=True)]
        tables.append(pa.Table.from_arrays(arrays, schema=COUNTS))
    table = pa.concat_tables(tables)
    write_table(path, table, identity)
    return table.num_rows


if __name__ == "__main__":
    stage.run(main)
