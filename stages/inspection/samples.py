"""A readable sample of every kind of data file."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.artifacts import schemas
from stages.artifacts.tables import open_table
from stages.core.errors import UserError
from stages.inspection.origin import open_input
from stages.inspection.text import readable, shorten, table

LINES = 12


def sample(path: Path, manifest: dict[str, Any] | None) -> str:
    """Return a sample of the data file at `path` as text; `manifest` (where known) helps to decode token ids."""
    if path.suffix == ".parquet":
        return parquet(path, manifest)
    if path.suffix == ".safetensors":
        return safetensors(path)
    if path.suffix == ".jsonl":
        return json_lines(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return f"  {path.stat().st_size} bytes, not text"
    more = [f"  … {len(lines) - LINES} more lines"] if len(lines) > LINES else []
    return "\n".join([*(f"  {shorten(line, 118)}" for line in lines[:LINES]), *more])


def parquet(path: Path, manifest: dict[str, Any] | None) -> str:
    """Return rows, columns and a sample fit for the kind of table, known by its columns."""
    file = open_table(path, pa.schema([]))
    columns = ", ".join(
        f"{field.name} {field.type}" for field in file.schema_arrow if not pa.types.is_nested(field.type)
    )
    nested = ", ".join(field.name for field in file.schema_arrow if pa.types.is_nested(field.type))
    head = f"  {file.metadata.num_rows} rows; {columns}{'; nested: ' + nested if nested else ''}"
    names = set(file.schema_arrow.names)
    for schema, view in KINDS:
        if set(schema) <= names:
            return f"{head}\n{view(path, manifest)}"
    return f"{head}\n{generic(path, manifest)}"


def generic(path: Path, manifest: dict[str, Any] | None) -> str:
    """The first rows."""
    rows = _head(path, 8)
    return (
        table(rows.column_names, [list(row.values()) for row in rows.to_pylist()]) if rows.num_rows else "  (no rows)"
    )


def examples(path: Path, manifest: dict[str, Any] | None) -> str:
    """The first examples of a corpus as text."""
    blocks = []
    for row in _head(path, 3).to_pylist():
        blocks.append(f"  [{row['example_id']}] {row['bytes']} bytes")
        for slot in row["slots"]:
            mark = "" if slot["loss"] else " (not trained on)"
            blocks.append(f"    {slot['role']}{mark}: {shorten(slot['text'].replace(chr(10), '⏎'), 200)}")
    return "\n".join(blocks)


def mapping(path: Path, manifest: dict[str, Any] | None) -> str:
    """Counts by kind, the ten nearest mined tokens and the ten farthest."""
    rows = pq.read_table(path).to_pylist()
    mined = sorted(
        (row for row in rows if row["kind"] == "mined"), key=lambda row: (row["distance"], row["student_id"])
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row["kind"] for row in rows).most_common())
    header = ("student id", "student token", "teacher id", "teacher token", "distance")

    def lines(part: list[dict]) -> list[tuple]:
        return [
            tuple(row[key] for key in ("student_id", "student_bytes", "teacher_id", "teacher_bytes", "distance"))
            for row in part
        ]

    nearest, farthest = table(header, lines(mined[:10])), table(header, lines(mined[::-1][:10]))
    return f"  {kinds}\n  nearest mined:\n{nearest}\n  farthest:\n{farthest}"


def provenance(path: Path, manifest: dict[str, Any] | None) -> str:
    """Counts by rule and a few rows of each, with the source tokens decoded."""
    rows = pq.read_table(path).to_pylist()
    names = token_texts(manifest, "source_tokenizer")
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        for row in [row for row in rows if row["rule"] == rule][-4:]:
            sources = " ".join(names.get(i, str(i)) for i in row["source_ids"][:8])
            lines.append((row["id"], row["bytes"], rule, sources, row["norm"]))
    counts = ", ".join(f"{count} {rule}" for rule, count in Counter(row["rule"] for row in rows).most_common())
    return f"  {counts}\n{table(('id', 'token', 'rule', 'source tokens', 'norm'), lines)}"


def scores(path: Path, manifest: dict[str, Any] | None) -> str:
    """Bits per byte over all examples, and the easiest and hardest of them."""
    rows = pq.read_table(path).to_pylist()
    rows.sort(key=lambda row: row["bits"] / max(row["bytes"], 1))
    total = sum(row["bits"] for row in rows) / max(1, sum(row["bytes"] for row in rows))
    lines = [
        (row["example_id"], row["bytes"], row["tokens"], row["bits"] / max(row["bytes"], 1))
        for row in [*rows[:4], *rows[4:][-4:]]
    ]
    header = ("example", "bytes", "tokens", "bits per byte")
    return f"  {total:.4f} bits per byte over all; easiest and hardest:\n{table(header, lines)}"


def task_samples(path: Path, manifest: dict[str, Any] | None) -> str:
    """The mean of each metric."""
    grouped = (
        pq.read_table(path).group_by(["task", "filter", "metric"]).aggregate([("value", "mean"), ("value", "count")])
    )
    return table(("task", "filter", "metric", "mean", "n"), [list(row.values()) for row in grouped.to_pylist()])


def counts(path: Path, manifest: dict[str, Any] | None) -> str:
    """The most frequent tokens of each side."""
    rows = pq.read_table(path)
    blocks = []
    for side in pc.unique(rows["side"]).to_pylist():
        part = rows.filter(pc.equal(rows["side"], side)).sort_by([("count", "descending")])
        lines = [(row["id"], row["bytes"], row["count"]) for row in part.slice(0, 10).to_pylist()]
        blocks.append(f"  {side}, {pc.sum(part['count']).as_py()} tokens:\n{table(('id', 'token', 'count'), lines)}")
    return "\n".join(blocks)


def signals(path: Path, manifest: dict[str, Any] | None) -> str:
    """The first tokens of the first example: what the teacher expected at each place."""
    row = _head(path, 1).to_pylist()
    if not row:
        return "  (no rows)"
    first, names = row[0], token_texts(manifest, "tokenizer")
    ids = first["input_ids"]
    count = len(first.get("observed_logprob") or ids)
    alternatives = _alternatives(first, count)
    lines = []
    for i in range(min(count, len(ids) - 1, 24)):
        observed, boundary = (_at(first, key, i) for key in ("observed_logprob", "boundary_logprob"))
        best = (
            "  ".join(f"{names.get(t, str(t))} {np.exp(p):.2f}" for t, p in alternatives[i][:5])
            if alternatives
            else None
        )
        boundary_mass = None if boundary is None else float(np.exp(boundary))
        lines.append((i + 1, names.get(ids[i + 1], str(ids[i + 1])), observed, boundary_mass, best))
    text = "".join(names.get(i, "")[1:-1] for i in ids)
    header = ("place", "token", "log p", "boundary mass", "likeliest instead")
    return f"  [{first['example_id']}] {len(ids)} tokens: {shorten(text, 110)}\n{table(header, lines)}"


def safetensors(path: Path) -> str:
    """The tensors' names, shapes and types, from the header alone."""
    with open(path, "rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        except (struct.error, ValueError):
            raise UserError(f"{path} is not a safetensors file: it is damaged or cut off; build it again.") from None
    tensors = {name: facts for name, facts in sorted(header.items()) if name != "__metadata__"}
    total = sum(int(np.prod(facts["shape"])) for facts in tensors.values())
    lines = [(name, " x ".join(map(str, facts["shape"])), facts["dtype"]) for name, facts in tensors.items()]
    more = f"\n  … {len(lines) - 20} more" if len(lines) > 20 else ""
    return f"  {len(lines)} tensors, {total:,} values\n{table(('tensor', 'shape', 'dtype'), lines[:20])}{more}"


def json_lines(path: Path) -> str:
    """The first and the last records."""
    with open(path, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    kept = lines if len(lines) <= 6 else [*lines[:3], "…", *lines[-3:]]
    return "\n".join([f"  {len(lines)} records", *(f"  {shorten(line, 160)}" for line in kept)])


def token_texts(manifest: dict[str, Any] | None, name: str) -> dict[int, str]:
    """Return id -> readable token of the tokenizer among a manifest's inputs (or its first shard's), else {}."""
    if manifest is None:
        return {}
    tokenizer = open_input(manifest, name)
    if tokenizer is None:
        shard = open_input(manifest, "shards")
        return token_texts(shard, name) if shard else {}
    rows = pq.read_table(tokenizer["path"].parent / "tokens.parquet", columns=schemas.TOKENS.names).to_pylist()
    return {
        row["id"]: f'"{row["text"] or row["role"]}"' if row["bytes"] is None else readable(row["bytes"]) for row in rows
    }


def _alternatives(row: dict[str, Any], count: int) -> list[list[tuple[int, float]]]:
    """Return the top-k (id, log-probability) of each place, [] when the table has none."""
    blocks = row.get("topk_ids"), row.get("topk_logprobs")
    if not all(isinstance(block, bytes) and block for block in blocks) or not count:
        return []
    ids = np.frombuffer(blocks[0], np.uint32).reshape(count, -1)
    values = np.frombuffer(blocks[1], np.float16).reshape(count, -1).astype(np.float32)
    return [list(zip(a.tolist(), b.tolist(), strict=True)) for a, b in zip(ids, values, strict=True)]


def _at(row: dict[str, Any], key: str, index: int) -> float | None:
    values = row.get(key)
    return None if values is None else values[index]


def _head(path: Path, rows: int) -> pa.Table:
    file = open_table(path, pa.schema([]))
    batch = next(file.iter_batches(batch_size=rows), None)
    return pa.Table.from_batches([batch] if batch is not None else [], schema=file.schema_arrow)


KINDS = (
    (schemas.EXAMPLES.names, examples),
    (schemas.MAPPING.names, mapping),
    (schemas.PROVENANCE.names, provenance),
    (schemas.SCORES.names, scores),
    (schemas.TASK_SAMPLES.names, task_samples),
    (schemas.COUNTS.names, counts),
    (("example_id", "input_ids"), signals),
)
