"""The report's figures as SVG: the same bytes for the same data, readable on paper and on a dark screen."""

import io
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette without black and yellow: distinguishable with colour blindness, legible on white and black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#7f7f7f")
INK = "#123456"  # replaced by the page's text colour
LONGEST = 60  # characters of a name in a figure
STYLE = {
    "text.parse_math": False,  # names of users are text, whatever dollars and backslashes they hold
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}


@contextmanager
def drawing(**more: Any) -> Iterator[None]:
    """Draw in STYLE, whatever this machine's matplotlib is set to.

    Which glyphs its fonts lack is no news: text stays text in the SVG, and the reader's fonts draw it.
    """
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with warnings.catch_warnings(), plt.style.context(["default", STYLE | more]):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        fonts.setLevel(logging.ERROR)
        try:
            yield
        finally:
            fonts.setLevel(level)


def plain(name: str) -> str:
    """Return a user's name on one line of at most LONGEST characters, its middle left out when it is longer."""
    line = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in name)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[-(LONGEST // 2 - 1) :]}"


def legend(figure: Figure, entries: dict[str, Any]) -> None:
    """Draw a legend of {name: what was drawn} below a figure, in as many columns as its names leave room."""
    names = [plain(name) for name in entries]
    letters = figure.get_figwidth() * 72 / 6
    columns = max(1, min(4, int(letters / (6 + max(map(len, names))))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    numbers = [str(number) for number in range(len(names))]
    made = figure.legend(list(entries.values()), numbers, loc="outside lower center", ncols=columns, fontsize=8)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_text(name)  # only now: matplotlib leaves out labels that begin with an underscore


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element. `name` keeps its ids apart from those of other figures on the page."""
    stream = io.StringIO()
    with drawing(**{"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    text = stream.getvalue()
    # Only within tags: between them stands text, which may be anything.
    return re.sub(r"<[^>]*>", lambda tag: tag[0].replace(INK, "currentColor"), text[text.index("<svg") :])


def bits_per_byte_bars(rows: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> Figure:
    """Bits per byte of the experiments of each story with 95 % intervals; baselines are dashed lines."""
    stories = list(dict.fromkeys(row["story"] for row in rows))
    heights = [max(1, sum(row["story"] == story for row in rows)) for story in stories]
    with drawing():
        height = 0.42 * sum(heights) + 0.75 * len(stories) + 0.4
        figure, axes = plt.subplots(
            len(stories),
            1,
            figsize=(8, height),
            squeeze=False,
            sharex=True,
            height_ratios=heights,
            layout="constrained",
        )
        for axis, story in zip(axes[:, 0], stories, strict=True):
            part = [row for row in rows if row["story"] == story]
            _bars(axis, part)
            axis.set_title(plain(story) or "experiments")
            lines = {}
            for number, row in enumerate(baselines):
                style = {"color": COLOURS[-1 - number % 3], "linestyle": (0, (4, 2)), "linewidth": 1.2}
                lines[row["label"]] = axis.axvline(row["value"], **style)
        ends = [row["value"] + side * 1.959964 * (row["stderr"] or 0.0) for row in rows for side in (-1, 1)]
        ends += [row["value"] for row in baselines]
        margin = 0.06 * max(max(ends) - min(ends), 1e-3)
        axes[0, 0].set_xlim(max(0.0, min(ends) - margin), max(ends) + margin)
        axes[-1, 0].set_xlabel("bits per byte of held-out text (lower is better), 95 % interval over documents")
        if baselines:
            legend(figure, lines)
    return figure


def _bars(axis: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        error = 1.959964 * (row["stderr"] or 0.0)
        axis.errorbar(row["value"], place, xerr=error, fmt="o", color=COLOURS[0], capsize=4, markersize=6, linewidth=2)
        axis.annotate(
            f"{row['value']:.3f}", (row["value"], place), (0, 7), textcoords="offset points", ha="center", size=8
        )
    axis.set_yticks(list(places), [plain(row["label"]) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.7)


def compute_scatter(points: list[dict[str, Any]]) -> Figure:
    """Bits per byte against the cost of reading a byte; points {label, story, flops, value, stderr}."""
    with drawing():
        figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
        stories = list(dict.fromkeys(point["story"] for point in points))
        drawn = {}
        for number, story in enumerate(stories):
            part = [point for point in points if point["story"] == story]
            drawn[story] = axis.errorbar(
                [point["flops"] for point in part],
                [point["value"] for point in part],
                yerr=[1.959964 * (point["stderr"] or 0.0) for point in part],
                fmt="osD^v"[number % 5],
                color=COLOURS[number % len(COLOURS)],
                capsize=3,
            )
        flops = [point["flops"] for point in points]
        if max(flops) > 3 * min(flops):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(
                lambda value, _: f"{value:.0e}".replace("e+0", "e")
            )  # the default is a formula
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.35)
        _label_points(axis, points, height=240)
        axis.set_xlabel("forward FLOPs per byte of text")
        axis.set_ylabel("bits per byte")
        legend(figure, drawn)
    return figure


def _label_points(axis: Axes, points: list[dict[str, Any]], height: float) -> None:
    """Write labels right of their points, moved up where two would touch; `height` of the axis in points."""
    bottom, top = axis.get_ylim()
    columns: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda point: point["value"]):
        columns.setdefault(f"{point['flops']:.1e}", []).append(point)
    for column in columns.values():
        place = -float("inf")
        for point in column:
            natural = (point["value"] - bottom) / (top - bottom) * height
            place = max(natural, place + 11)
            axis.annotate(
                plain(point["label"]),
                (point["flops"], point["value"]),
                (14, place - natural),
                textcoords="offset points",
                size=8,
                va="center",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkB": 2, "relpos": (0, 0.5)},
            )


def learning_curves(curves: list[dict[str, Any]]) -> Figure:
    """One panel per loss, one line per experiment; curves {loss, label, steps, values}."""
    losses = list(dict.fromkeys(curve["loss"] for curve in curves))
    labels = list(dict.fromkeys(curve["label"] for curve in curves))
    with drawing():
        figure, axes = plt.subplots(
            1, len(losses), figsize=(max(5.0, 4.3 * len(losses)), 3.4), squeeze=False, layout="constrained"
        )
        lines: dict[str, Any] = {}
        for axis, loss in zip(axes[0], losses, strict=True):
            for curve in (curve for curve in curves if curve["loss"] == loss):
                number = labels.index(curve["label"])
                style = {
                    "color": COLOURS[number % len(COLOURS)],
                    "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
                }
                (lines[curve["label"]],) = axis.plot(curve["steps"], curve["values"], **style)
            axis.set_title(loss)
            axis.set_xlabel("optimizer step")
        axes[0, 0].set_ylabel("loss")
        legend(figure, lines)
    return figure


def fertility_bars(pairs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Bytes per token of both sides of each tokenizer pair; {name: the two rows of schema FERTILITY for all text}."""
    with drawing():
        figure, axis = plt.subplots(figsize=(max(4.5, 1.6 * len(pairs) + 2), 2.6), layout="constrained")
        for number, side in enumerate(("teacher", "student")):
            rows = [row for part in pairs.values() for row in part if row["side"] == side]
            places = [index + 0.4 * number - 0.2 for index in range(len(rows))]
            values = [row["bytes_per_token"] for row in rows]
            style = {"color": COLOURS[number], "label": side, "ecolor": INK, "capsize": 3}
            bars = axis.bar(places, values, 0.37, yerr=_errors(rows), error_kw={"linewidth": 1}, **style)
            axis.bar_label(bars, fmt="%.3g", size=8, color=INK, padding=2)
        axis.margins(y=0.12)
        axis.set_xticks(range(len(pairs)), list(pairs))
        axis.set_ylabel("bytes per token")
        axis.grid(visible=False, axis="x")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def fertility_by_class(pairs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Bytes per token by class of characters, a panel for each pair; {name: rows of schema FERTILITY}."""
    classes = [list(dict.fromkeys(row["class"] for row in rows)) for rows in pairs.values()]
    heights = [max(1, len(names)) for names in classes]
    with drawing():
        size = (8, 0.3 * sum(heights) + 0.75 * len(pairs) + 0.4)
        figure, axes = plt.subplots(
            len(pairs), 1, figsize=size, squeeze=False, sharex=True, height_ratios=heights, layout="constrained"
        )
        for axis, (name, rows), names in zip(axes[:, 0], pairs.items(), classes, strict=True):
            for number, side in enumerate(("teacher", "student")):
                part = [row for row in rows if row["side"] == side]
                places = [names.index(row["class"]) + 0.24 * number - 0.12 for row in part]
                values = [row["bytes_per_token"] for row in part]
                style = {"fmt": "os"[number], "color": COLOURS[number], "capsize": 3, "markersize": 5, "label": side}
                axis.errorbar(values, places, xerr=_errors(part), **style)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(max(1, len(names)) - 0.4, -0.6)
            axis.set_title(name.replace("\n", ", "))
        axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1))
        axes[-1, 0].set_xlabel("bytes per token")
    return figure


def _errors(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the distances of bytes per token to the lower and the upper end of its interval, 0 where it has none."""
    lower, upper = [], []
    for row in rows:
        value, low, high = (row[f"bytes_per_token{end}"] for end in ("", "_low", "_high"))
        lower.append(0.0 if low is None else value - low)
        upper.append(0.0 if high is None else high - value)
    return lower, upper


def distance_histogram(distances: dict[str, dict[str, dict[int, float]]]) -> Figure:
    """Shares of student tokens by edit distance from their teacher tokens; {name: {weighting: {distance: share}}}."""
    with drawing():
        figure, axes = plt.subplots(
            1, len(distances), figsize=(max(5.0, 3.6 * len(distances)), 3.0), squeeze=False, layout="constrained"
        )
        for axis, (name, weightings) in zip(axes[0], distances.items(), strict=True):
            for number, (weighting, shares) in enumerate(weightings.items()):
                places = [distance + 0.4 * number - 0.2 * (len(weightings) - 1) for distance in shares]
                heights = [100 * share for share in shares.values()]
                axis.bar(places, heights, 0.8 / len(weightings), color=COLOURS[number], label=f"of the {weighting}")
            axis.set_title(name)
            axis.set_xlabel("edit distance in bytes")
            axis.set_xlim(0.4, max(5, *(distance for shares in weightings.values() for distance in shares)) + 0.6)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(visible=False, axis="x")
        axes[0, 0].set_ylabel("% of student tokens")
        axes[0, 0].legend(loc="upper right")
    return figure
