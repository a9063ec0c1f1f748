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
from stages.inspection import mappings
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


def generations(path: Path, manifest: dict[str, Any] | None) -> str:
    """How answers ended, and the first ones."""
    rows = pq.read_table(path).to_pylist()
    reasons = Counter(row["finish_reason"] for row in rows)
    kept = sum(row["kept"] for row in rows)
    ends = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    keys = ("document_id", "finish_reason", "kept", "prompt_tokens", "answer")
    lines = [(*(row[key] for key in keys[:-1]), len(row["output_ids"]), row["answer"]) for row in rows[:LINES]]
    header = ("document", "finish", "kept", "prompt tokens", "tokens", "answer")
    return f"  {ends}; {kept} kept\n{table(header, lines)}"


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
    """Counts by kind, the best and worst mined tokens, and of the unreliable ones those that are used most."""
    found = pq.read_table(path)
    side, other = ("student", "teacher") if found.column_names[0] == "student_id" else ("teacher", "student")
    rows = found.to_pylist()
    keys = [f"{side}_id", f"{side}_bytes", f"{other}_id", f"{other}_bytes", "distance", "normalised_distance"]
    keys += ["confidence", "runner_up_id"]
    header = [key.replace("bytes", "token").replace("_", " ") for key in keys]

    def lines(part: list[dict[str, Any]], *more: str) -> str:
        return table([*header, *more], [[row[key] for key in (*keys, *more)] for row in part])

    mined = mappings.mined(rows, side)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row["kind"] for row in rows).most_common())
    head = f"  {kinds}; {sum(not row['reliable'] for row in mined)} of the mined ones unreliable"
    statistics = path.resolve().parent.parent / "statistics"
    used = mappings.uses(sorted(statistics.glob("*/counts.parquet")), side, len(rows))
    if used is None:
        last = f"  no statistics of this pair in {statistics}: which unreliable ones are used most is not known"
    else:
        most = mappings.unreliable(rows, side, used)[:10]
        last = f"  unreliable and used most:\n{lines(most, 'uses')}" if most else "  no unreliable one is used"
    return f"{head}\n  best mined:\n{lines(mined[:10])}\n  worst mined:\n{lines(mined[::-1][:10])}\n{last}"


def projection(path: Path, manifest: dict[str, Any] | None) -> str:
    """The first student tokens whose probability goes to several teacher tokens."""
    rows = pq.read_table(path)
    student, teacher = (token_texts(manifest, name) for name in ("tokenizer", "teacher_tokenizer"))
    shared = pc.less(rows["weight"], 1)
    targets: dict[int, list[str]] = {}
    for row in rows.filter(shared).slice(0, 64).to_pylist():
        name = teacher.get(row["teacher_id"], str(row["teacher_id"]))
        targets.setdefault(row["student_id"], []).append(f"{name} {row['weight']:.3f}")
    lines = [(i, student.get(i, str(i)), "  ".join(parts)) for i, parts in list(targets.items())[:LINES]]
    whole = rows.num_rows - (pc.sum(shared).as_py() or 0)
    return f"  {whole} student tokens have one teacher token\n{table(('id', 'student token', 'teacher tokens'), lines)}"


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
    rows = [row for row in pq.read_table(path).to_pylist() if row["bits"] is not None]
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


def fertility(path: Path, manifest: dict[str, Any] | None) -> str:
    """Bytes per token and tokens per word of both sides in each class of characters, with 95 % intervals."""

    def interval(row: dict[str, Any], name: str) -> str:
        value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
        if value is None:
            return "-"
        return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"

    rows = pq.read_table(path).to_pylist()
    lines = [
        [row[name] for name in ("class", "side", "bytes", "tokens")]
        + [interval(row, name) for name in ("bytes_per_token", "tokens_per_word")]
        for row in rows
    ]
    return table(("class", "side", "bytes", "tokens", "bytes per token", "tokens per word"), lines)


def coverage(path: Path, manifest: dict[str, Any] | None) -> str:
    """What each side's vocabulary has in common with the other's, and the advice that lies in the summary beside it."""
    lines = [
        [row["side"], row["group"]]
        + [value for of in ("types", "uses") for value in (row[of], _percent(row[f"matched_{of}"], row[of]))]
        + [" ".join(map(readable, row["unmatched"]))]
        for row in pq.read_table(path).to_pylist()
    ]
    header = ("side", "tokens", "types", "matched", "uses", "matched", "most used without a match")
    summary = path.with_name("summary.json")
    advice = json.loads(summary.read_text(encoding="utf-8"))["advice"] if summary.is_file() else []
    return "\n".join([table(header, lines), *(f"  {sentence}" for sentence in advice)])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def bias(path: Path, manifest: dict[str, Any] | None) -> str:
    """How many pairs are free of bias, and the most used pairs that are not."""
    rows = pq.read_table(path)
    worst = pc.max_element_wise(rows["bias1"], rows["bias2"])
    uses = pc.min_element_wise(rows["teacher_count"], rows["student_count"])
    free = pc.sum(pc.equal(worst, 0)).as_py() or 0
    rows = rows.append_column("uses", uses).filter(pc.greater(worst, 0)).sort_by([("uses", "descending")])
    keys = ("teacher_id", "teacher_bytes", "student_id", "student_bytes", "bias1", "bias2")
    lines = [tuple(row[key] for key in keys) for row in rows.slice(0, 16).to_pylist()]
    header = ("teacher id", "teacher token", "student id", "student token", "bias1", "bias2")
    return f"  {free} pairs without bias; the most used with one:\n{table(header, lines)}"


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
    (schemas.GENERATIONS.names, generations),
    (schemas.MAPPING.names, mapping),
    (schemas.REVERSE_MAPPING.names, mapping),
    (schemas.PROJECTION.names, projection),
    (schemas.PROVENANCE.names, provenance),
    (schemas.SCORES.names, scores),
    (schemas.TASK_SAMPLES.names, task_samples),
    (schemas.COUNTS.names, counts),
    (schemas.BIAS.names, bias),
    (schemas.FERTILITY.names, fertility),
    (schemas.COVERAGE.names, coverage),
    (("example_id", "input_ids"), signals),
)
