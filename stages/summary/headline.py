"""The result in sentences: what the teacher added, what training added, and what is only noise."""

from collections.abc import Callable
from typing import Any

from stages.summary.collect import without_seed

NAMES = {"bits_per_byte": "bits per byte", "acc": "accuracy", "acc_norm": "length-normalised accuracy"}
ORDER = ("bits_per_byte", "acc_norm", "acc")
FEWEST = 6  # below, a sign test cannot reach 5 %


def metric_name(metric: str) -> str:
    """Return a metric's name as words."""
    return NAMES.get(metric, metric.replace("_", " "))


HEADINGS = {
    "control": "What the teacher added",
    "start": "What training added",
    "asked": "Also compared",
}


def sections(
    comparisons: list[dict[str, Any]], stories: list[str], label: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Return {heading, lead, stories: [{story, items: [{text, verdict, better}]}]} on each kind's leading metric.

    `label` turns the name of a model or experiment into what the config calls it. A row over several seeds replaces the
    rows of its single seeds.
    """
    found = []
    for kind, heading in HEADINGS.items():
        part = [row for row in comparisons if row["kind"] == kind]
        leading = next((metric for metric in ORDER if any(row["metric"] == metric for row in part)), None)
        part = [row for row in without_members(part) if leading in (None, row["metric"])]
        if not part:
            continue
        grouped = []
        for story in stories:
            items = [
                {"text": sentence(row, label), "verdict": row["verdict"], "better": row["better"]}
                for row in part
                if row["story"] == story
            ]
            grouped += [{"story": story, "items": items}] if items else []
        found.append({"heading": heading, "lead": lead(kind, part), "stories": grouped})
    return found


def without_members(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without those of a single seed that a row over several seeds stands for."""
    combined = {(row["a"], row["b"]) for row in rows if row["seeds"] > 1}
    return [row for row in rows if row["seeds"] > 1 or (without_seed(row["a"]), without_seed(row["b"])) not in combined]


def lead(kind: str, rows: list[dict[str, Any]]) -> str:
    """Return how many comparisons of a kind are differences, in one sentence."""
    better = sum(row["better"] == "a" for row in rows)
    worse = sum(row["better"] == "b" for row in rows)
    noise = len(rows) - better - worse
    what = {
        "control": "against the same training on the text alone",
        "start": "against the model that training began with",
        "asked": "in the comparisons asked for",
    }[kind]
    counts = [
        f"{number} {word}" for number, word in ((better, "better"), (worse, "worse"), (noise, "within noise")) if number
    ]
    return f"By {metric_name(rows[0]['metric'])} {what}: {', '.join(counts)}."


def sentence(row: dict[str, Any], label: Callable[[str], str]) -> str:
    """Return one comparison as a sentence."""
    over = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    values = f"{label(row['a'])}: {row['value_a']:.3f} {metric_name(row['metric'])}, against {row['value_b']:.3f} for "
    values += f"{label(row['b'])}{over}"
    if row["verdict"] == "within noise":
        interval = f"95 % interval {number(row['low'], '+')} to {number(row['high'], '+')}"
        few = f"; {row['n']} documents are too few to tell" if row["n"] < FEWEST else ""
        return f"{values}. The difference of {number(row['difference'], '+')} is within noise ({interval}{few})."
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    gain = f"{number(abs(row['difference']))} (95 % interval {number(low)} to {number(high)})"
    verb = {"a": "improves it by", "b": "worsens it by"}[row["better"]]
    who = {"control": "The teacher's signal", "start": "Training", "asked": "This"}[row["kind"]]
    return f"{values}. {who} {verb} {gain}."


def number(value: float, sign: str = "") -> str:
    """Return three decimals, or two significant digits where those would hide the value."""
    return format(value, f"{sign}.3f" if value == 0 or abs(value) >= 0.01 else f"{sign}.2g")
