"""What the report shows, as plain values for its template. No HTML here but the drawn graph."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from stages.artifacts.schemas import COVERAGE, FERTILITY, MAPPING
from stages.artifacts.tables import read_table
from stages.core.artifact import data_path, read_manifest
from stages.core.errors import UserError
from stages.inspection import mappings
from stages.inspection.origin import run_facts
from stages.inspection.text import size
from stages.summary import collect, graph, headline
from stages.summary.collect import AS_IT_IS

SIDES = ("teacher", "student")
TOTALS = ("types", "uses")
ALIGNMENTS, TOKENS = 4, 60  # examples drawn per pair, tokens drawn per side, to the end of a chunk
CAPTIONS = {
    "bars": "Bits per byte of held-out text with 95 % intervals over documents; dashed lines are models as they are. "
    "The intervals of paired differences, which decide above, are narrower: all models read the same documents.",
    "compute": "Quality against cost: bits per byte and the forward FLOPs a model spends on a byte of text.",
    "learning-curves": "Learning curves of the trained experiments.",
    "fertility": "Bytes per token of both tokenizers on the same text, with 95 % intervals over documents; longer "
    "tokens mean fewer steps.",
    "fertility-by-class": "Bytes per token by class of characters, with 95 % intervals over documents. A token that "
    "classes share counts in each by its bytes, so that the classes add up to the text.",
    "mapping-distance": "How far mined student tokens are from their teacher tokens: shares of all tokens of the "
    "vocabulary, and of all tokens of the text. What is missing to 100 % has exact matches.",
}


def context(job: Any) -> dict[str, Any]:
    """Return everything the template needs, from the inputs of the report job."""
    summary = job.inputs["summary"]
    rows = read_table(data_path(summary, "summary.parquet"), collect.SUMMARY).to_pylist()
    comparisons = read_table(data_path(summary, "comparisons.parquet"), collect.COMPARISONS).to_pylist()
    labels = {row["model"]: row["label"] for row in rows}
    artifacts, versions = built(job.root, [manifest for _, manifest, _ in job.spec["graph"]])
    return {
        "title": job.spec["title"],
        "sections": headline.sections(comparisons),
        "results": result_table(rows, comparisons, training(job.inputs.get("students", []))),
        "comparisons": [row | {"metric": headline.metric_name(row, comparisons)} for row in comparisons],
        "notes": notes(job.inputs.get("evaluations", []), labels),
        "figures": figures(summary),
        "statistics": [statistics(item) for item in job.inputs.get("statistics", [])],
        "mappings": [mapping(job, item) for item in job.inputs.get("mappings", [])],
        "signals": [found for item in job.inputs.get("teachers", []) if (found := signals(item))],
        "graph": graph.draw([(stage, manifest, inputs) for stage, manifest, inputs in job.spec["graph"]]),
        "artifacts": artifacts,
        "stages": per_stage(artifacts),
        "versions": versions,
    }


def figures(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Return {kind, caption, svg} of the summary's figures, in reading order."""
    found = [(facts["figure"], name) for name, facts in summary["data"].items() if "figure" in facts]
    found.sort(key=lambda figure: (list(CAPTIONS).index(figure[0]), figure[1]))
    return [
        {"kind": kind, "caption": CAPTIONS[kind], "svg": data_path(summary, name).read_text(encoding="utf-8")}
        for kind, name in found
    ]


def notes(evaluations: list[dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return {models, suite, task, note} of what the evaluations have to say of their numbers."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for evaluation in evaluations:
        model, suite = collect.place_of(evaluation)
        for note in collect.results_of(evaluation)["notes"]:
            found.setdefault((suite, note["task"], note["note"]), []).append(labels.get(model, model))
    return [
        {"models": models, "suite": suite, "task": task, "note": note} for (suite, task, note), models in found.items()
    ]


def signals(index: dict[str, Any]) -> dict[str, Any] | None:
    """Return {teacher, corpus, kept, rows} of a teacher's signals: what each kind loses of its distributions.

    None where only log-probabilities of single tokens are kept, which lose nothing.
    """
    rows = index["metrics"].get("signal_error")
    if not rows:
        return None
    needs = json.loads(data_path(index, "shards.json").read_text(encoding="utf-8"))["needs"]
    kept = {"top_k": needs["top_k"], "samples": needs.get("samples"), "hidden": needs.get("hidden")}
    names = {"top_k": "likeliest tokens", "samples": "drawn tokens", "hidden": "hidden state, bfloat16"}
    teacher, corpus = Path(index["name"]).parts[-3:-1]
    lines = [
        row
        | {
            "name": names[row["signal"]] if row["signal"] == "hidden" else f"{row['size']} {names[row['signal']]}",
            "kept": bool(kept[row["signal"]]) and (row["signal"] == "hidden" or row["size"] <= kept[row["signal"]]),
        }
        for row in rows
    ]
    return {"teacher": teacher, "corpus": corpus, "rows": lines}


def training(students: list[dict[str, Any]]) -> dict[str, str]:
    """Return name of an experiment -> the FLOPs of its training, as a short text."""
    return {
        student["path"].parent.name: f"{student['metrics']['flops']:.2g}"
        for student in students
        if "flops" in student["metrics"]
    }


def result_table(
    rows: list[dict[str, Any]], comparisons: list[dict[str, Any]], flops: dict[str, str]
) -> dict[str, Any]:
    """Return {columns, heads, stories}: a line for each model, a cell for each suite, task, metric and filter."""

    def column_of(row: dict[str, Any]) -> tuple[str, ...]:
        return row["suite"], row["task"], row["metric"], row["filter"]

    columns = {column_of(row): row for row in rows}
    best = {column: _best([row for row in rows if column_of(row) == column]) for column in columns}
    alone = [row for row in comparisons if row["kind"] == "control" and row["seeds"] == 1]
    verdicts = {(row["a"], *column_of(row)): row["better"] for row in alone}
    models: dict[str, dict[str, Any]] = {}
    for row in rows:
        column = column_of(row)
        facts = {key: row[key] for key in ("model", "label", "story", "method", "seed")}
        line = models.setdefault(row["model"], facts | {"flops": flops.get(row["model"]), "cells": {}})
        line["cells"][column] = {key: row[key] for key in ("value", "low", "high")} | {
            "best": row["value"] is not None and row["value"] == best[column],
            "better": verdicts.get((row["model"], *column)),
        }
    stories = defaultdict(list)
    for line in models.values():
        stories[line["story"] or ("" if line["method"] == AS_IT_IS else "Experiments")].append(line)
    heads = [
        {key: row[key] for key in ("suite", "task")} | {"metric": headline.metric_name(row, rows)}
        for row in columns.values()
    ]
    ordered = sorted(stories, key=lambda story: (story == "", list(stories).index(story)))
    return {
        "columns": list(columns),
        "heads": heads,
        "stories": [(story or "Models as they are", stories[story]) for story in ordered],
    }


def _best(rows: list[dict[str, Any]]) -> float | None:
    """Return the best value of a column, None where nobody said which is better."""
    values, up = [row["value"] for row in rows if row["value"] is not None], {row["higher_is_better"] for row in rows}
    return (max if up.pop() else min)(values) if values and up in ({True}, {False}) else None


def statistics(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of one tokenizer pair on one corpus: its names, tables of figures, advice and alignments."""
    teacher, student, _, corpus = Path(manifest["name"]).parts[-5:-1]
    values = json.loads(data_path(manifest, "summary.json").read_text(encoding="utf-8"))
    sides = values["sides"]
    drawn = []
    if "alignments.json" in manifest["data"]:
        examples = json.loads(data_path(manifest, "alignments.json").read_text(encoding="utf-8"))
        drawn = [chunks(example) for example in examples[:ALIGNMENTS]]
    return {
        "teacher": teacher,
        "student": student,
        "corpus": corpus,
        "sides": [
            (words(key), [(sides[side].get(key), sides[side].get(f"{key}_interval")) for side in SIDES])
            for key in sides["teacher"]
            if not key.endswith("_interval")
        ],
        "overlap": [(words(key), value) for key, value in values.get("overlap", {}).items()],
        "chunks": [
            (kind, facts["chunks"], facts["bytes_per_chunk"], list(facts["shares"].items()))
            for kind, facts in values.get("chunks", {}).items()
        ],
        "fertility": fertility(read_table(data_path(manifest, "fertility.parquet"), FERTILITY).to_pylist()),
        "coverage": coverage(read_table(data_path(manifest, "coverage.parquet"), COVERAGE).to_pylist()),
        "advice": [sentence.split(": ", 1) for sentence in values["advice"]],
        "alignments": drawn,
    }


def fertility(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {class, share of the text's bytes, bytes_per_token, tokens_per_word}.

    Both are (value, lower end, upper end) of each side, teacher first.
    """
    total = max((row["bytes"] for row in rows), default=0)  # that of all classes
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["class"], {"class": row["class"], "share": row["bytes"] / total})
        for name in ("bytes_per_token", "tokens_per_word"):
            line.setdefault(name, []).append([row[f"{name}{end}"] for end in ("", "_low", "_high")])
    return list(lines.values())


def coverage(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of the student's tokens, the most used first, with the matched shares of types and uses."""
    student = sorted((row for row in rows if row["side"] == "student"), key=lambda row: (-row["uses"], -row["types"]))
    return [
        row
        | {f"{measure}_share": row[f"matched_{measure}"] / row[measure] if row[measure] else None for measure in TOTALS}
        | {"unmatched": [visible(token.decode("utf-8", "backslashreplace")) for token in row["unmatched"]]}
        for row in student
    ]


def words(key: str) -> str:
    """Return a key as words."""
    return key.replace("_", " ")


def chunks(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Return columns {chunk, teacher, student} of the beginning of one alignment; chunk -1 is text without one."""
    columns: list[dict[str, Any]] = []
    sides = {side: list(zip(example[side]["tokens"], example[side]["chunks"], strict=True)) for side in SIDES}
    places = dict.fromkeys(SIDES, 0)

    def take(side: str, chunk: int) -> list[str]:
        taken = []
        while places[side] < len(sides[side]) and sides[side][places[side]][1] == chunk:
            taken.append(visible(sides[side][places[side]][0]))
            places[side] += 1
        return taken

    while max(places.values()) < TOKENS:
        following = [sides[side][places[side]][1] for side in SIDES if places[side] < len(sides[side])]
        if not following:
            break
        columns.append({"chunk": min(following)} | {side: take(side, min(following)) for side in SIDES})
    return columns


def visible(text: str) -> str:
    """Return a token's text with its whitespace made visible."""
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def mapping(job: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return {teacher, student, kinds, unreliable, tables} of a mapping.

    tables: the ten best and the ten worst mined tokens, and the unreliable ones that the pair's corpora use most.
    """
    teacher, student = Path(manifest["name"]).parts[-4:-2]
    rows = read_table(data_path(manifest, "mapping.parquet"), MAPPING).to_pylist()
    mined = mappings.mined(rows, "student")
    used = mappings.uses(collect.counts_of_pair(job, manifest), "student", len(rows))
    tables = [("ten best", mined[:10]), ("ten worst", mined[::-1][:10])]
    if used is not None:
        tables.append(("unreliable, most used", mappings.unreliable(rows, "student", used)[:10]))

    def text(content: bytes | None) -> str:
        return visible((content or b"").decode("utf-8", "backslashreplace"))

    return {
        "teacher": teacher,
        "student": student,
        "kinds": Counter(row["kind"] for row in rows).most_common(),
        "unreliable": sum(not row["reliable"] for row in mined),
        "tables": [
            (name, [(text(row["student_bytes"]), text(row["teacher_bytes"]), row["distance"]) for row in part])
            for name, part in tables
        ],
    }


def built(root: Path, manifests: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return ({manifest, stage, lineage, bytes, seconds} of each artifact that is there, versions of all packages)."""
    rows, versions = [], {}
    for name in manifests:
        try:
            manifest = read_manifest(root / name, name)
        except UserError:
            continue
        versions |= manifest["versions"]
        total = sum(facts["bytes"] for facts in manifest["data"].values())
        seconds = run_facts(root / name).get("seconds")
        kept = {"manifest": name, "stage": manifest["stage"], "lineage": manifest["lineage"]}
        rows.append(kept | {"bytes": total, "size": size(total), "seconds": seconds})
    return rows, dict(sorted(versions.items()))


def per_stage(artifacts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {stage, count, seconds, size} in the order of the pipeline."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in artifacts:
        grouped[row["stage"]].append(row)
    return [
        {
            "stage": stage,
            "count": len(part),
            "seconds": sum(row["seconds"] or 0 for row in part),
            "size": size(sum(row["bytes"] for row in part)),
        }
        for stage, part in grouped.items()
    ]
