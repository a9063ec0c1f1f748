"""Paired comparisons of evaluated models, per task and metric, over seeds where there are several."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluation.aggregation import FORMULAS
from stages.summary import bootstrap
from stages.summary.collect import Measured, labels_of, measure_of, measured, pairs, place_of, results_of

NO_PAIRS = "no paired comparison"


@dataclass(frozen=True)
class Side:
    """What is compared: one model or experiment, or the group of experiments that differ in their seeds only."""

    name: str
    is_group: bool


@dataclass(frozen=True)
class Comparison:
    """Two sides and the pairs of names that make them, one for each seed."""

    kind: str
    a: Side
    b: Side
    members: list[tuple[str, str]]
    within_seeds: bool  # one of a group that has a comparison of its own


def compare_all(
    evaluations: list[dict[str, Any]], experiments: list[dict[str, Any]], asked: list[list[str]], seed: int
) -> list[dict[str, Any]]:
    """Return the rows of COMPARISONS. Pairs that differ in their seeds only become one row more, over all seeds."""
    found = {place_of(evaluation): measured(evaluation) for evaluation in evaluations}
    suites = {place_of(evaluation)[1]: results_of(evaluation)["suite"] for evaluation in evaluations}
    entries = {entry["name"]: entry for entry in experiments}
    labels, group_labels = labels_of(experiments)
    rows = []
    for comparison in comparisons(pairs(experiments, asked, {name for name, _ in found}), entries):
        members = comparison.members
        facts = {"kind": comparison.kind, "seeds": len(members)}
        for column, side in (("a", comparison.a), ("b", comparison.b)):
            called = group_labels if side.is_group else labels
            facts |= {column: side.name, f"label_{column}": called.get(side.name, side.name)}
        facts |= {"story": entries.get(members[0][0], {}).get("story") or "", "within_seeds": comparison.within_seeds}
        for suite, kind in sorted(suites.items()):
            sides = [[found.get((name, suite), {}) for name in pair] for pair in members]
            for key, first in sides[0][0].items():
                if all(key in side for pair in sides for side in pair):
                    generator = bootstrap.named_generator(seed, f"compare {members} {suite} {' '.join(key)}")
                    values = compare([(a[key], b[key]) for a, b in sides], generator)
                    rows.append(facts | measure_of(suite, kind, first.row) | values)
    return rows


def comparisons(wanted: list[tuple[str, str, str]], entries: dict[str, dict[str, Any]]) -> list[Comparison]:
    """Return every wanted (a, b, kind), each group of them that differ in their seeds only before its members."""

    def side(name: str) -> Side:
        group = entries.get(name, {}).get("group")
        return Side(group or name, bool(group))

    grouped: dict[tuple[Side, Side, str], list[tuple[str, str]]] = {}
    for a, b, kind in wanted:
        grouped.setdefault((side(a), side(b), kind), []).append((a, b))
    found = []
    for (first, second, kind), members in grouped.items():
        several = len(members) > 1
        if several:
            found.append(Comparison(kind, first, second, members, within_seeds=False))
        for a, b in members:
            found.append(Comparison(kind, Side(a, False), Side(b, False), [(a, b)], within_seeds=several))
    return found


def compare(couples: list[tuple[Measured, Measured]], generator: np.random.Generator) -> dict[str, Any]:
    """Return the columns of COMPARISONS that say how one metric of a and b differs; one couple for each seed."""
    sides = list(zip(*couples, strict=True))
    known = all(one.row["value"] is not None for side in sides for one in side)
    means = [float(np.mean([one.row["value"] for one in side])) if known else None for side in sides]
    first = couples[0][0].row
    row = {"value_a": means[0], "value_b": means[1], "difference": means[0] - means[1] if known else None}
    row |= {"low": None, "high": None, "p": None, "n": first["n"], "better": ""}
    reason = _reason(couples)
    if reason is None:
        a, b = ((np.stack([one.values for one in s]), np.stack([one.weights for one in s])) for s in sides)
        interval = bootstrap.difference(a, b, FORMULAS[first["aggregation"]], generator)
        if interval is None:
            reason = "values too large to draw again"
    if reason is not None:
        return row | {"verdict": NO_PAIRS, "reason": reason}
    up = {one.row["higher_is_better"] for side in sides for one in side}
    if interval.verdict == "difference" and up in ({True}, {False}):
        row["better"] = "a" if (interval.value > 0) == up.pop() else "b"
    ends = {"low": interval.low, "high": interval.high, "p": interval.p, "n": len(couples[0][0].units)}
    return row | ends | {"verdict": interval.verdict, "reason": ""}


def _reason(couples: list[tuple[Measured, Measured]]) -> str | None:
    """Return why documents cannot be compared in pairs, None where they can."""
    everyone = [one for couple in couples for one in couple]
    if any(one.row["value"] is None for one in everyone):
        return "a value is missing"
    if any(one.units is None for one in everyone) or len({one.row["aggregation"] for one in everyone}) > 1:
        return "the metric is not made of the values of single documents"
    if any(one.units != everyone[0].units for one in everyone):
        return "not the same documents"
    return None
