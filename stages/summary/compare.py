"""Paired comparisons of evaluated models, per task and metric, over seeds where there are several."""

from typing import Any

import numpy as np

from stages.summary import bootstrap
from stages.summary.collect import paired_samples, pairs, place_of, results_of, without_seed


def compare_all(
    evaluations: list[dict[str, Any]], experiments: list[dict[str, Any]], asked: list[list[str]], seed: int
) -> list[dict[str, Any]]:
    """Return the rows of COMPARISONS. Pairs that differ in their seeds only become one row more, over all seeds."""
    by_place = {place_of(evaluation): evaluation for evaluation in evaluations}
    samples = {place: paired_samples(evaluation) for place, evaluation in by_place.items()}
    higher = {
        (suite, result["task"], result["metric"]): bool(result.get("higher_is_better", True))
        for (_, suite), evaluation in by_place.items()
        for result in results_of(evaluation)["results"]
    }
    stories = {entry["name"]: entry.get("story") or "" for entry in experiments}
    wanted = pairs(experiments, asked, {name for name, _ in by_place})
    groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for a, b, kind in wanted:
        groups.setdefault((a, b, kind), []).append((a, b))
        groups.setdefault((without_seed(a), without_seed(b), kind), []).append((a, b))
    rows = []
    for (a, b, kind), members in groups.items():
        members = list(dict.fromkeys(members))
        if (a, b) not in members and len(members) < 2:
            continue
        for suite in sorted({suite for name, suite in by_place if name == members[0][0]}):
            for (task, metric), interval, values, units in _compare(members, suite, samples, seed):
                up = higher.get((suite, task, metric))
                if up is None:
                    continue
                better = "" if interval.verdict == "within noise" else "a" if (interval.value > 0) == up else "b"
                rows.append(
                    {
                        "a": a,
                        "b": b,
                        "kind": kind,
                        "story": stories.get(members[0][0], ""),
                        "suite": suite,
                        "task": task,
                        "metric": metric,
                        "value_a": values[0],
                        "value_b": values[1],
                        "difference": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                        "p": interval.p,
                        "n": units,
                        "seeds": len(members),
                        "better": better,
                        "verdict": interval.verdict,
                    }
                )
    return rows


def _compare(members: list[tuple[str, str]], suite: str, samples: dict, seed: int) -> list[tuple]:
    """Return ((task, metric), Interval of a - b, (value a, value b), units) of every metric both sides have."""
    if any((name, suite) not in samples for pair in members for name in pair):
        return []
    found = []
    keys = set.intersection(*(set(samples[name, suite]) for pair in members for name in pair))
    for task, metric in sorted(keys):
        sides = [[samples[name, suite][task, metric] for name in pair] for pair in members]
        shared = set.intersection(*(set(side[0]) for pair in sides for side in pair))
        if not shared:
            continue
        a, b, sizes = (np.stack(part) for part in zip(*(_aligned(pair, shared) for pair in sides), strict=True))
        name = f"compare {members} {suite} {task} {metric}"
        interval = bootstrap.ratio(a - b, sizes, bootstrap.named_generator(seed, name))
        values = float(a.sum() / sizes.sum()), float(b.sum() / sizes.sum())
        found.append(((task, metric), interval, values, len(shared)))
    return found


def _aligned(pair: list[tuple], shared: set[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (values of a, values of b, sizes) over the units in `shared`, in the order of their names."""
    columns = []
    for names, values, sizes in pair:
        place = {name: index for index, name in enumerate(names)}
        order = [place[name] for name in sorted(shared)]
        columns.append((values[order], sizes[order]))
    return columns[0][0], columns[1][0], columns[0][1]
