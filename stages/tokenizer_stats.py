"""Count what two tokenizers make of a corpus: tokens, fertility, overlap and coverage of vocabularies, chunks."""

import hashlib
from typing import Any

from stages.core import stage

ROWS = 512
DRAWN = 6
DRAWN_BYTES = (24, 160)


def main(argv: list[str] | None = None) -> None:
    """Write counts, fertility and coverage (schemas of their names), summary.json and alignments.json."""
    job = stage.parse("stages.tokenizer_stats", __doc__, argv)
    import pyarrow as pa
    from tqdm import tqdm

    from stages.alignment.statistics import PairStatistics, ahead, drawn_alignment
    from stages.artifacts.schemas import COVERAGE, EXAMPLES, FERTILITY
    from stages.artifacts.tables import read_batches, write_table
    from stages.core.artifact import write_json
    from stages.tokenization import ByteView

    views = [ByteView.load(job.inputs[name]["path"].parent) for name in ("teacher_tokenizer", "tokenizer")]
    statistics = PairStatistics(*views)
    sample = _Sample()
    with job.publish() as draft:
        batches = read_batches(job.data("corpus", "train.parquet"), EXAMPLES, ROWS)
        rows_of = (batch.to_pylist() for batch in tqdm(batches, desc="batches of examples"))
        for rows, encoded in ahead(lambda rows: statistics.encode([row["slots"] for row in rows]), rows_of):
            slots, starts = ([row[name] for row in rows] for name in ("slots", "starts_document"))
            statistics.add(slots, encoded, starts)
            sample.add(rows)
        drawn = [
            {"example_id": row["example_id"], "text": "".join(slot["text"] for slot in row["slots"])}
            | drawn_alignment(*views, row["slots"])
            for row in sample.rows
        ]
        summary = statistics.summary()
        tables = {
            "counts": _counts(statistics),
            "fertility": pa.Table.from_pylist(summary.pop("fertility"), FERTILITY),
            "coverage": pa.Table.from_pylist(summary.pop("coverage"), COVERAGE),
        }
        for name, table in tables.items():
            write_table(draft.folder / f"{name}.parquet", table, job.identity)
            draft.describe[f"{name}.parquet"] = {"rows": table.num_rows}
        write_json(draft.folder / "summary.json", summary)
        write_json(draft.folder / "alignments.json", drawn)
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


def _counts(statistics: Any) -> Any:
    """Return the table of schema COUNTS: every token id of both sides."""
    import pyarrow as pa

    from stages.artifacts.schemas import COUNTS

    tables = []
    for side, view in statistics.views.items():
        size = view.vocab_size
        columns = [[side] * size, range(size), view.token_bytes, statistics.counts[side]]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, COUNTS, strict=True)]
        tables.append(pa.Table.from_arrays(arrays, schema=COUNTS))
    return pa.concat_tables(tables)


if __name__ == "__main__":
    stage.run(main)
