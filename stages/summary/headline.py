"""The result in sentences: what the teacher added, what training added, and what is only noise."""

from typing import Any

from stages.summary.compare import NO_PAIRS

FEWEST = 6  # below, a sign test cannot reach 5 %


HEADINGS = {
    "control": "What the teacher added",
    "start": "What training added",
    "asked": "Also compared",
}


def metric_name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the metric of a row as words, with its filter where `rows` have several of it."""
    place = [row[key] for key in ("suite", "task", "metric")]
    filters = {other["filter"] for other in rows if [other[key] for key in ("suite", "task", "metric")] == place}
    words = row["metric"].replace("_", " ")
    return f"{words} ({row['filter']})" if len(filters) > 1 else words


def sections(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {heading, lead, stories: [{story, items: [{text, verdict, better}]}]} of each kind of comparison.

    Sentences are on bits per byte where a suite measures them, else on the leading metric of each task. A row over
    several seeds replaces the rows of its single seeds.
    """
    found = []
    for kind, heading in HEADINGS.items():
        part = [row for row in comparisons if row["kind"] == kind and row["leads"] and not row["within_seeds"]]
        part = [row for row in part if row["suite_kind"] == "bits_per_byte"] or part
        if not part:
            continue
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in part:
            item = {"text": sentence(row, metric_name(row, comparisons)), "verdict": row["verdict"]}
            grouped.setdefault(row["story"], []).append(item | {"better": row["better"]})
        names = dict.fromkeys(metric_name(row, comparisons) for row in part)
        stories = [{"story": story, "items": items} for story, items in grouped.items()]
        found.append({"heading": heading, "lead": lead(kind, ", ".join(names), part), "stories": stories})
    return found


def lead(kind: str, metrics: str, rows: list[dict[str, Any]]) -> str:
    """Return how many comparisons of a kind are differences, in one sentence."""
    what = {
        "control": "against the same training on the text alone",
        "start": "against the model that training began with",
        "asked": "in the comparisons asked for",
    }[kind]
    better, worse = (sum(row["better"] == side for row in rows) for side in "ab")
    noise = sum(row["verdict"] == "within noise" for row in rows)
    none = sum(row["verdict"] == NO_PAIRS for row in rows)
    counted = {"better": better, "worse": worse, "within noise": noise, "not compared in pairs": none}
    counted["different"] = len(rows) - sum(counted.values())
    counts = [f"{number} {words}" for words, number in counted.items() if number]
    return f"By {metrics} {what}: {', '.join(counts)}."


def sentence(row: dict[str, Any], metric: str) -> str:
    """Return one comparison as a sentence."""
    over = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
    task = "" if row["suite_kind"] == "bits_per_byte" else f" of {row['task']}"
    values = f"{row['label_a']}: {number(row['value_a'])} {metric}{task}, against {number(row['value_b'])} for "
    values += f"{row['label_b']}{over}"
    if row["verdict"] == NO_PAIRS:
        return f"{values}. There is no paired comparison: {row['reason']}."
    if row["verdict"] == "within noise":
        interval = f"95 % interval {number(row['low'], '+')} to {number(row['high'], '+')}"
        few = f"; {row['n']} documents are too few to tell" if row["n"] < FEWEST else ""
        return f"{values}. The difference of {number(row['difference'], '+')} is within noise ({interval}{few})."
    if not row["better"]:
        interval = f"95 % interval {number(row['low'], '+')} to {number(row['high'], '+')}"
        return f"{values}. They differ by {number(row['difference'], '+')} ({interval}); which is better is not known."
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    gain = f"{number(abs(row['difference']))} (95 % interval {number(low)} to {number(high)})"
    verb = {"a": "improves it by", "b": "worsens it by"}[row["better"]]
    who = {"control": "The teacher's signal", "start": "Training", "asked": "This"}[row["kind"]]
    return f"{values}. {who} {verb} {gain}."


def number(value: float | None, sign: str = "") -> str:
    """Return three decimals, or few digits where those would hide the value or go on for long; "-" for None."""
    if value is None:
        return "-"
    plain = value == 0 or 0.01 <= abs(value) < 10_000
    return format(value, f"{sign}.3f" if plain else f"{sign}.3g")
