"""From the manifests of evaluations to tidy rows, and to the paired samples that comparisons need."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from stages.artifacts.schemas import SCORES, TASK_SAMPLES
from stages.artifacts.tables import read_table
from stages.core.artifact import data_path

AS_IT_IS = "as it is"  # the method of a model that no experiment made
Z = 1.959964  # of a 95 % normal interval

MEASURE = (
    ("suite", pa.string()),
    ("suite_kind", pa.string()),  # bits_per_byte or lm_eval
    ("task", pa.string()),
    ("metric", pa.string()),
    ("filter", pa.string()),  # of lm-eval, which may score one answer by several
    ("leads", pa.bool_()),  # speaks for what the suite names: the first metric of a task or group
)
SUMMARY = pa.schema(
    [
        ("model", pa.string()),  # name of the experiment or model
        ("label", pa.string()),
        ("story", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("group", pa.string()),  # of experiments that differ in their seeds only; null for others
        *MEASURE,
        ("value", pa.float64()),  # null where it is no finite number
        ("stderr", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),  # documents
        ("higher_is_better", pa.bool_()),  # null where nobody said
    ]
)
COMPARISONS = pa.schema(
    [
        ("a", pa.string()),  # name of an experiment or model; over seeds, of the group of experiments
        ("b", pa.string()),
        ("label_a", pa.string()),
        ("label_b", pa.string()),
        ("kind", pa.string()),  # control: b learns from the text alone; start: b is what a was trained from; asked
        ("story", pa.string()),
        *MEASURE,
        ("value_a", pa.float64()),  # over seeds their mean
        ("value_b", pa.float64()),
        ("difference", pa.float64()),  # a - b
        ("low", pa.float64()),  # null, like p, where documents cannot be compared in pairs
        ("high", pa.float64()),
        ("p", pa.float64()),
        ("n", pa.int64()),  # documents
        ("seeds", pa.int64()),
        ("within_seeds", pa.bool_()),  # another row stands for this one and its like with other seeds
        ("better", pa.string()),  # a, b, or empty when within noise or not known
        ("verdict", pa.string()),  # difference, within noise, no paired comparison
        ("reason", pa.string()),  # why there is no paired comparison
    ]
)


def place_of(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Return (model or experiment, suite) of an evaluation: the last two folders of its path."""
    parts = Path(evaluation["name"]).parts
    return parts[-3], parts[-2]


def method_of(entry: dict[str, Any]) -> str:
    """Return the losses of an experiment joined by "+", or "no training"."""
    return "+".join(entry.get("losses") or []) or "no training"


def summary_rows(evaluations: list[dict[str, Any]], experiments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per model, task and metric, as in SUMMARY."""
    entries = {entry["name"]: entry for entry in experiments}
    labels, _ = labels_of(experiments)
    rows = []
    for evaluation in evaluations:
        name, suite = place_of(evaluation)
        entry = entries.get(name)
        facts = {
            "model": name,
            "label": labels.get(name, name),
            "story": (entry.get("story") or "") if entry else "",
            "method": method_of(entry) if entry else AS_IT_IS,
            "seed": entry.get("seed") if entry else None,
            "group": entry.get("group") if entry else None,
        }
        results = results_of(evaluation)
        for result in results["results"]:
            value, error = result["value"], result["stderr"]
            # A perplexity's error is not alike to both sides.
            known = value is not None and error is not None and result["aggregation"] != "perplexity"
            ends = {"low": value - Z * error, "high": value + Z * error} if known else {"low": None, "high": None}
            kept = {key: result[key] for key in ("value", "stderr", "n", "higher_is_better")}
            rows.append(facts | measure_of(suite, results["suite"], result) | kept | ends)
    return rows


def measure_of(suite: str, kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of MEASURE of a row of results.json."""
    return {"suite": suite, "suite_kind": kind} | {key: result[key] for key in ("task", "metric", "filter", "leads")}


def labels_of(experiments: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (name -> label) of experiments and (name -> label) of the groups that differ in their seeds only.

    Of a group the seed tells the experiments apart; others of one story that share a label get their name behind it.
    """
    users: dict[tuple[str, str], set[str]] = {}
    parts: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for entry in experiments:
        name, group = entry["name"], entry.get("group")
        users.setdefault((entry.get("story"), entry["label"]), set()).add(group or name)
        parts.setdefault((group, "" if group else name), []).append(entry)
    names, groups = {}, {}
    for (group, _), part in parts.items():
        alike = len({entry["label"] for entry in part}) == 1
        for entry in part:
            label, name = entry["label"], entry["name"]
            if len(users[entry.get("story"), label]) > 1:
                label = f"{label} ({group or name})"
            names[name] = f"{label}, seed {entry['seed']}" if alike and len(part) > 1 else label
        if group:
            groups[group] = label if alike else group
    return names, groups


def results_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the results.json of an evaluation."""
    return json.loads(data_path(evaluation, "results.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Measured:
    """One metric of one model: its row of results.json, and where it can be drawn again, the documents it is made of.

    The metric is `aggregation` (stages.evaluation.aggregation) of values and weights; `units` is who they are of.
    """

    row: dict[str, Any]
    units: list[Any] | None = None
    values: np.ndarray | None = None
    weights: np.ndarray | None = None


def measured(evaluation: dict[str, Any]) -> dict[tuple[str, str, str], Measured]:
    """Return (task, metric, filter) -> what an evaluation holds of it."""
    results, path = results_of(evaluation), data_path(evaluation, "samples.parquet")
    if results["suite"] == "bits_per_byte":
        sums = pl.col("bits").sum().alias("value"), pl.col("bytes").cast(pl.Float64).sum().alias("weight")
        table = pl.from_arrow(read_table(path, SCORES)).group_by("document_id").agg(*sums)
        samples = {key_of(row): table.rename({"document_id": "unit"}) for row in results["results"]}
    else:
        unit = pl.struct("subtask", "doc_id").alias("unit")
        table = pl.from_arrow(read_table(path, TASK_SAMPLES)).with_columns(unit)
        samples = table.partition_by("task", "metric", "filter", as_dict=True)
    found = {}
    for row in results["results"]:
        key = key_of(row)
        if row["value"] is None or row["aggregation"] is None or key not in samples:
            found[key] = Measured(row)
        else:
            part = samples[key].sort("unit")
            found[key] = Measured(row, *(part["unit"].to_list(), part["value"].to_numpy(), part["weight"].to_numpy()))
    return found


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what tells a row of results.json from the others of its file."""
    return row["task"], row["metric"], row["filter"]


def pairs(experiments: list[dict[str, Any]], asked: list[list[str]], evaluated: set[str]) -> list[tuple[str, str, str]]:
    """Return (a, b, kind) to compare: with the control, with the start of training, and those `asked` for."""
    found = []
    for entry in experiments:
        if entry.get("control"):
            found.append((entry["name"], entry["control"], "control"))
        start = start_of(entry, experiments)
        if start:
            found.append((entry["name"], start, "start"))
    found += [(a, b, "asked") for a, b in asked]
    return [pair for pair in dict.fromkeys(found) if {pair[0], pair[1]} <= evaluated]


def start_of(entry: dict[str, Any], experiments: list[dict[str, Any]]) -> str | None:
    """Return what an experiment was trained from: the untrained experiment with its tokenizer, else its student."""
    if not entry.get("losses"):
        return None
    same = ("student", "tokenizer", "story")
    for other in experiments:
        if not other.get("losses") and all(other.get(key) == entry.get(key) for key in same):
            return other["name"]
    return entry.get("student")


def counts_of_pair(job: Any, mapping: dict[str, Any]) -> list[Path]:
    """Return the token counts among a job's statistics that are of the same two tokenizers as a mapping."""
    pair = Path(mapping["name"]).parts[-4:-2]
    statistics = job.inputs.get("statistics", [])
    return [data_path(item, "counts.parquet") for item in statistics if Path(item["name"]).parts[-5:-3] == pair]
