"""The result in sentences: what the teacher added, what training added, and what is only noise."""

from collections.abc import Callable
from typing import Any

NAMES = {"bits_per_byte": "bits per byte", "acc": "accuracy", "acc_norm": "length-normalised accuracy"}
ORDER = ("bits_per_byte", "acc_norm", "acc")


def metric_name(metric: str) -> str:
    """Return a metric's name as words."""
    return NAMES.get(metric, metric.replace("_", " "))


def headlines(comparisons: list[dict[str, Any]], label: Callable[[str], str]) -> list[dict[str, str]]:
    """Return {story, text, verdict} per comparison with a control (else with the start) on the leading metric.

    `label` turns the name of a model or experiment into what the config calls it. Rows over several seeds replace those
    of their single seeds.
    """
    found = []
    for kind in ("control", "start", "asked"):
        part = [row for row in comparisons if row["kind"] == kind]
        leading = next((metric for metric in ORDER if any(row["metric"] == metric for row in part)), None)
        part = [row for row in part if row["metric"] == (leading or row["metric"])]
        most = {}
        for row in part:
            key = row["story"], label(row["a"]), row["suite"]
            if key not in most or row["seeds"] > most[key]["seeds"]:
                most[key] = row
        found += [
            {"story": row["story"], "text": sentence(row, label), "verdict": row["verdict"], "kind": kind}
            for row in most.values()
        ]
    return found


def sentence(row: dict[str, Any], label: Callable[[str], str]) -> str:
    """Return one comparison as a sentence."""
    a, b, metric = label(row["a"]), label(row["b"]), metric_name(row["metric"])
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    over = f" over {row['seeds']} seeds" if row["seeds"] > 1 else ""
    values = f"{a} reaches {row['value_a']:.3f} {metric}{over}, {b} {row['value_b']:.3f}"
    if row["verdict"] == "within noise":
        interval = f"95 % interval {row['low']:+.3f} to {row['high']:+.3f}"
        return f"{values}: within noise (difference {row['difference']:+.3f}, {interval})."
    verb = "better" if row["better"] == "a" else "worse"
    gain = f"{abs(row['difference']):.3f} {verb} (95 % interval {low:.3f} to {high:.3f})"
    if row["kind"] == "control":
        effect = "the teacher adds this" if row["better"] == "a" else "the teacher costs this"
        return f"{values}: {gain}; {effect} beyond training on the same text alone."
    return f"{values}: {gain}."
