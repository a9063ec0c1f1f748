"""From the manifests of evaluations to tidy rows, and to the paired samples that comparisons need."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts.schemas import SCORES, TASK_SAMPLES
from stages.artifacts.tables import read_table
from stages.core.artifact import data_path

AS_IT_IS = "as it is"  # the method of a model that no experiment made
Z = 1.959964  # of a 95 % normal interval

SUMMARY = pa.schema(
    [
        ("model", pa.string()),  # name of the experiment or model
        ("label", pa.string()),
        ("story", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("suite", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("higher_is_better", pa.bool_()),
    ]
)
COMPARISONS = pa.schema(
    [
        ("a", pa.string()),
        ("b", pa.string()),
        ("kind", pa.string()),  # control: b learns from the text alone; start: b is what a was trained from; asked
        ("story", pa.string()),
        ("suite", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value_a", pa.float64()),
        ("value_b", pa.float64()),
        ("difference", pa.float64()),  # a - b
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("p", pa.float64()),
        ("n", pa.int64()),  # documents
        ("seeds", pa.int64()),
        ("better", pa.string()),  # a, b, or empty when within noise
        ("verdict", pa.string()),
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
    known = {entry["name"]: entry for entry in experiments}
    labels = labels_of(experiments)
    rows = []
    for evaluation in evaluations:
        name, suite = place_of(evaluation)
        entry = known.get(name)
        facts = {
            "model": name,
            "label": labels.get(name, name),
            "story": (entry.get("story") or "") if entry else "",
            "method": method_of(entry) if entry else AS_IT_IS,
            "seed": entry.get("seed") if entry else None,
            "suite": suite,
        }
        for result in results_of(evaluation)["results"]:
            error = result["stderr"]
            spread = Z * error if error is not None else None
            value = result["value"]
            interval = (
                {"low": value - spread, "high": value + spread} if spread is not None else {"low": None, "high": None}
            )
            kept = {key: result.get(key) for key in ("task", "metric", "value", "stderr", "n", "higher_is_better")}
            rows.append(facts | kept | interval)
    return rows


def labels_of(experiments: list[dict[str, Any]]) -> dict[str, str]:
    """Return name -> label; experiments that share one get their seed behind it."""
    shared = Counter((entry.get("story"), entry["label"]) for entry in experiments)
    return {
        entry["name"]: entry["label"]
        + (f", seed {entry['seed']}" if shared[entry.get("story"), entry["label"]] > 1 else "")
        for entry in experiments
    }


def results_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the results.json of an evaluation."""
    return json.loads(data_path(evaluation, "results.json").read_text(encoding="utf-8"))


def paired_samples(evaluation: dict[str, Any]) -> dict[tuple[str, str], tuple[list[str], np.ndarray, np.ndarray]]:
    """Return (task, metric) -> (unit names, values [units], sizes [units]) whose ratio of sums is the metric.

    A unit is what is drawn again in a bootstrap: a document for bits per byte, an item for a task.
    """
    path = data_path(evaluation, "samples.parquet")
    if "bits" in pq.read_schema(path).names:
        table = read_table(path, SCORES)
        names, cluster = np.unique(np.array(table["document_id"].to_pylist()), return_inverse=True)
        bits = np.bincount(cluster, table["bits"].to_numpy())
        sizes = np.bincount(cluster, table["bytes"].to_numpy().astype(float))
        task = results_of(evaluation)["results"][0]["task"]
        return {(task, "bits_per_byte"): (names.tolist(), bits, sizes)}
    found: dict[tuple[str, str], tuple[list[str], list[float]]] = {}
    for row in read_table(path, TASK_SAMPLES).to_pylist():
        names_, values = found.setdefault((row["task"], row["metric"]), ([], []))
        names_.append(f"{row['doc_id']} {row['filter']}")
        values.append(row["value"])
    return {key: (names_, np.array(values), np.ones(len(values))) for key, (names_, values) in found.items()}


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


def without_seed(name: str) -> str:
    """Return the name of an experiment without the part that a matrix over seeds gave it."""
    return re.sub(r"-?seed\d+", "", name)
