"""Examples of a corpus as rows (schema EXAMPLES): made of turns, and written."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.corpora.cutting import Turn

ROWS_PER_GROUP = 10_000


def example_rows(
    document_id: str, examples: Iterable[Sequence[Turn]], starts: bool, ends: bool
) -> list[dict[str, Any]]:
    """Return a document's examples as rows; those in which nothing is trained on are left out.

    `starts`, `ends`: whether the document begins and ends where its source does.
    """
    rows = []
    cut = list(examples)
    for number, turns in enumerate(cut):
        if any(turn.loss and (turn.text or turn.extra) for turn in turns):
            slots = [turn._asdict() | {"extra": turn.extra or None} for turn in turns]
            rows.append(
                {
                    "example_id": f"{document_id}:{number}",
                    "document_id": document_id,
                    "slots": slots,
                    "starts_document": starts and number == 0,
                    "ends_document": ends and number == len(cut) - 1,
                    "bytes": sum(len(turn.text.encode()) for turn in turns),
                }
            )
    return rows


class ExampleWriter:
    """Writes examples in row groups and counts them; `identity` is that of the job (`Job.identity`)."""

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        import pyarrow.parquet as pq

        from stages.artifacts.schemas import EXAMPLES
        from stages.artifacts.tables import schema_with

        self._schema = schema_with(EXAMPLES, identity)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []
        self._documents: set[str] = set()
        self.examples = self.bytes = 0

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take rows; they are written with others."""
        self._rows += rows
        self._documents.update(row["document_id"] for row in rows)
        self.examples += len(rows)
        self.bytes += sum(row["bytes"] for row in rows)
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def counts(self) -> dict[str, int]:
        """Return the numbers of documents, examples and bytes written."""
        return {"documents": len(self._documents), "examples": self.examples, "bytes": self.bytes}

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []
