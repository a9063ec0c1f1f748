"""Put all results side by side: tidy table, paired comparisons with intervals, and the figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from stages.core import stage
from stages.core.artifact import data_path


def main(argv: list[str] | None = None) -> None:
    """Read evaluations, metrics, statistics and mappings; write the tables and figures of the report."""
    job = stage.parse("stages.summarize", __doc__, argv)
    import pyarrow as pa

    from stages.artifacts.tables import write_table
    from stages.summary import collect
    from stages.summary.compare import compare_all

    experiments = job.spec["experiments"]
    evaluations = job.inputs.get("evaluations", [])
    rows = collect.summary_rows(evaluations, experiments)
    comparisons = compare_all(evaluations, experiments, job.spec.get("comparisons", []), job.spec["seed"])
    with job.publish() as draft:
        for name, values, schema in (
            ("summary", rows, collect.SUMMARY),
            ("comparisons", comparisons, collect.COMPARISONS),
        ):
            write_table(draft.folder / f"{name}.parquet", pa.Table.from_pylist(values, schema=schema), job.identity)
            draft.describe[f"{name}.parquet"] = {"rows": len(values)}
        for name, (kind, text) in draw(job, rows).items():
            (draft.folder / f"{name}.svg").write_text(text, encoding="utf-8")
            draft.describe[f"{name}.svg"] = {"figure": kind}
        draft.metrics["comparisons"] = dict(sorted(Counter(row["verdict"] for row in comparisons).items()))


def draw(job: stage.Job, rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return name -> (what it shows, SVG) of every figure that there is data for."""
    from stages.summary import figures

    drawn = {}
    bits = [row for row in rows if row["suite_kind"] == "bits_per_byte" and row["value"] is not None]
    for suite in dict.fromkeys(row["suite"] for row in bits):
        part = [row for row in bits if row["suite"] == suite]
        tried = [row for row in part if row["seed"] is not None]
        baselines = [row for row in part if row["seed"] is None]
        if tried:
            drawn[f"{suite}-bars"] = "bars", figures.bits_per_byte_bars(tried, baselines)
        drawn[f"{suite}-compute"] = "compute", figures.compute_scatter(compute_points(job, part, suite))
    curves = learning_curves(job)
    if curves:
        drawn["learning-curves"] = "learning-curves", figures.learning_curves(curves)
    pairs = tokenizer_pairs(job)
    if pairs:
        overall, by_class = ({name: rows[part] for name, rows in pairs.items()} for part in (slice(2), slice(2, None)))
        drawn["fertility"] = "fertility", figures.fertility_bars(overall)
        drawn["fertility-by-class"] = "fertility-by-class", figures.fertility_by_class(by_class)
    distances = mapping_distances(job)
    if distances:
        drawn["mapping-distance"] = "mapping-distance", figures.distance_histogram(distances)
    return {name: (kind, figures.svg(figure, name)) for name, (kind, figure) in drawn.items()}


def compute_points(job: stage.Job, rows: list[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """Return {label, story, flops, value, stderr} of each model of a bits-per-byte suite."""
    from stages.summary.collect import AS_IT_IS, place_of, results_of

    flops = {
        place_of(evaluation)[0]: results_of(evaluation)["forward_flops_per_byte"]
        for evaluation in job.inputs.get("evaluations", [])
        if place_of(evaluation)[1] == suite
    }
    return [
        {key: row[key] for key in ("label", "value", "stderr")}
        | {"story": row["story"] or (AS_IT_IS if row["method"] == AS_IT_IS else "experiments")}
        | {"flops": flops[row["model"]]}
        for row in rows
    ]


def learning_curves(job: stage.Job) -> list[dict[str, Any]]:
    """Return {loss, label, steps, values} of each loss of each trained experiment."""
    from stages.summary.collect import labels_of

    labels, _ = labels_of(job.spec["experiments"])
    losses = {loss for entry in job.spec["experiments"] for loss in entry.get("losses") or []}
    curves = []
    for student in job.inputs.get("students", []):
        name = student["path"].parent.name
        text = data_path(student, "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        for loss in sorted(losses & {key for line in lines for key in line}):
            points = [(line["step"], line[loss]) for line in lines if loss in line]
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                curves.append({"loss": loss, "label": labels.get(name, name), "steps": steps, "values": values})
    return curves


def tokenizer_pairs(job: stage.Job) -> dict[str, list[dict[str, Any]]]:
    """Return "teacher → student, corpus" -> rows of schema FERTILITY, those of all text first."""
    from stages.artifacts.schemas import FERTILITY
    from stages.artifacts.tables import read_table

    found = {}
    for statistics in job.inputs.get("statistics", []):
        teacher, student, _, corpus = Path(statistics["name"]).parts[-5:-1]
        rows = read_table(data_path(statistics, "fertility.parquet"), FERTILITY).to_pylist()
        if rows:
            found[f"{teacher} → {student}\n{corpus}"] = rows
    return found


def mapping_distances(job: stage.Job) -> dict[str, dict[str, dict[int, float]]]:
    """Return "teacher → student" -> "vocabulary" and "use" -> edit distance -> share of all tokens mined at it.

    Of the vocabulary the share is of token ids, of use that of the tokens of the pair's corpora, where it has any.
    """
    import numpy as np

    from stages.artifacts.schemas import MAPPING
    from stages.artifacts.tables import read_table
    from stages.inspection.mappings import uses
    from stages.summary.collect import counts_of_pair

    found = {}
    for mapping in job.inputs.get("mappings", []):
        teacher, student = Path(mapping["name"]).parts[-4:-2]
        table = read_table(data_path(mapping, "mapping.parquet"), MAPPING, ["kind", "distance"])
        mined = np.array(table["kind"].to_pylist()) == "mined"
        used = uses(counts_of_pair(job, mapping), "student", len(mined))
        weights = {"vocabulary": np.ones(len(mined))} | ({} if used is None or not used.any() else {"use": used})
        if mined.any():
            distance = table["distance"].to_numpy()[mined]
            found[f"{teacher} → {student}"] = {
                name: dict(enumerate((np.bincount(distance, weight[mined]) / weight.sum()).tolist()))
                for name, weight in weights.items()
            }
    return found


if __name__ == "__main__":
    stage.run(main)
