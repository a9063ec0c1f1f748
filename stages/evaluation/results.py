"""What lm-eval returns as plain rows: every metric by task, metric and filter, and its values document by document."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.evaluation.aggregation import formula_of, same

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

Key = tuple[str, str]  # (metric, filter)


@dataclass
class Table:
    """Rows of results.json, rows of TASK_SAMPLES, and what a reader of the numbers must know: (task, sentence)."""

    results: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Documents:
    """The values of one metric and filter: whose they are, what the task gave, and how they make the metric."""

    owners: list[tuple[str, int]]  # (task, number of the document)
    values: np.ndarray  # nan where the task gave no finite number
    weights: np.ndarray
    formula: str | None  # see stages.evaluation.aggregation
    missing: int  # numbers that are not finite


def number(value: Any) -> float | None:
    """Return a number of any library as a float, None for what is no finite number."""
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def table(results: dict[str, Any], loaded: dict[str, Any]) -> Table:
    """Return everything that lm-eval's `results` hold. `loaded` are the groups and tasks, as its TaskManager has them.

    Groups come before tasks, and of each its metrics in the order that the task gives them.
    """
    tasks = {name: _documents(name, task, results["samples"].get(name, [])) for name, task in loaded["tasks"].items()}
    groups = {name: _of_group(results["results"][name], group, tasks) for name, group in loaded["groups"].items()}
    made = Table()
    leading = _leading(groups | tasks, loaded)
    made.notes += [(name, "gives no metric") for name, metrics in tasks.items() if not metrics]
    for name, metrics in (groups | tasks).items():
        for (metric, kind), documents in metrics.items():
            row = _row(results, name, metric, kind) | {"n": len(documents.owners)}
            row |= {"aggregation": documents.formula, "leads": (name, (metric, kind)) in leading}
            made.results.append(row)
            made.notes += _notes(row, documents, results["results"][name].get(f"{metric},{kind}"))
            place = {"task": name, "filter": kind, "metric": metric}
            for owner, value, weight in zip(documents.owners, documents.values, documents.weights, strict=True):
                facts = {"subtask": owner[0], "doc_id": owner[1], "value": number(value), "weight": number(weight)}
                made.samples.append(place | facts)
    return made


def _row(results: dict[str, Any], task: str, metric: str, kind: str) -> dict[str, Any]:
    """Return what lm-eval itself says of one metric and filter of a task or group."""
    values, version = results["results"][task], results.get("versions", {}).get(task)
    shots, up = (results.get(name, {}).get(task) for name in ("n-shot", "higher_is_better"))
    up = (up or {}).get(metric)
    return {
        "task": task,
        "metric": metric,
        "filter": kind,
        "value": number(values.get(f"{metric},{kind}")),
        "stderr": number(values.get(f"{metric}_stderr,{kind}")),
        "num_fewshot": shots if isinstance(shots, int) else None,
        "version": version if isinstance(version, str) else number(version),
        "higher_is_better": up if isinstance(up, bool) else None,
    }


def _notes(row: dict[str, Any], documents: Documents, given: Any) -> list[tuple[str, str]]:
    """Return what is missing in a row."""
    name = f"{row['metric']} ({row['filter']})"
    if row["value"] is None:
        return [(row["task"], f"{name} is {given}, no finite number, and left empty")]
    missing = f"{name} is no finite number in {documents.missing} documents"
    return [(row["task"], missing)] if documents.missing else []


def _documents(name: str, task: "Task", samples: list[dict[str, Any]]) -> dict[Key, Documents]:
    """Return the values of each metric of a task, in the order in which it gave them."""
    items: dict[Key, list[tuple[int, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            items.setdefault((str(metric), str(sample["filter"])), []).append((int(sample["doc_id"]), sample[metric]))
    functions = task.aggregation()
    return {key: _one(name, pairs, functions[key[0]]) for key, pairs in items.items()}


def _one(task: str, pairs: list[tuple[int, Any]], aggregate: "Callable[[list[Any]], float]") -> Documents:
    """Return the values of one metric: numbers, pairs (value, weight), or what `aggregate` makes of each item alone.

    Which they are is told by whether `aggregate` of many is a formula of them.
    """
    owners, items = [(task, doc_id) for doc_id, _ in pairs], [item for _, item in pairs]
    missing = sum(number(item) is None for item in items if isinstance(item, float | np.floating))
    for values, weights in _readings(items, aggregate):
        if np.isfinite([values, weights]).all():
            formula = formula_of(values, weights, lambda draw: aggregate([items[index] for index in draw]))
            if formula:
                return Documents(owners, values, weights, formula, missing)
    return Documents(owners, _floats(items), np.ones(len(items)), None, missing)


def _readings(items: list[Any], aggregate: "Callable[[list[Any]], float]") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the values and weights that items may stand for."""
    yield _floats(items), np.ones(len(items))
    if all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
        values, weights = map(_floats, zip(*items, strict=True))
        if values.any():  # nothing but zeros would be taken for weighted values wherever the metric is zero
            yield values, weights
    yield _floats([aggregate([item]) for item in items]), np.ones(len(items))


def _floats(items: Sequence[Any]) -> np.ndarray:
    """Return items as floats, nan for what is no finite number."""
    return np.array([math.nan if (found := number(item)) is None else found for item in items])


def _of_group(values: dict[str, Any], group: "Group", tasks: dict[str, dict[Key, Documents]]) -> dict[Key, Documents]:
    """Return the documents of each metric that a group has; by their weights its tasks count by size, or all alike."""
    inside = [tasks[task.task_name] for task in group.get_all_tasks()]
    found = {}
    for key in dict.fromkeys(key for metrics in inside for key in metrics):
        value = number(values.get(f"{key[0]},{key[1]}"))
        if f"{key[0]},{key[1]}" not in values:
            continue
        parts = [metrics[key] for metrics in inside if key in metrics]
        content = np.concatenate([part.values for part in parts])
        sizes = np.concatenate([np.full(len(part.owners), float(len(part.owners))) for part in parts])
        plain = all(part.formula == "mean" and (part.weights == 1).all() for part in parts)
        formula = None
        for weights in (np.ones(len(sizes)), 1 / sizes):
            mean = float((content * weights).sum() / weights.sum())
            if plain and value is not None and same(mean, value):
                formula, content = "mean", content * weights
                break
        owners = [owner for part in parts for owner in part.owners]
        found[key] = Documents(owners, content, weights, formula, sum(part.missing for part in parts))
    return found


def _leading(metrics: dict[str, dict[Key, Documents]], loaded: dict[str, Any]) -> set[tuple[str, Key]]:
    """Return the (task or group, key) that speak for what a suite names: the first metric of each."""
    found: set[tuple[str, Key]] = set()
    inside = {child for group in loaded["groups"].values() for child in group.child_names}

    def visit(name: str) -> None:
        if metrics[name]:
            found.add((name, next(iter(metrics[name]))))
        elif name in loaded["groups"]:
            for child in loaded["groups"][name].child_names:
                visit(child)

    for name in metrics:
        if name not in inside:
            visit(name)
    return found
