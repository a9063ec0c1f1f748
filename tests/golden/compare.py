"""How golden numbers are compared, by the tolerances of the golden README, and what the files say of tokenizers.

fp32 values: 1e-4 of each number; gradients: 1e-3. The 1e-6 beside it is for numbers that are small because greater ones
cancel, so it is a share of the greatest number around them, of an array of values or of a row of gradients, and never
more than 1e-6 itself: rows of 1e-11 are compared as closely as those of 1.
"""

import json
from pathlib import Path

import numpy as np

ROUNDING = 1e-6


def values(found, expected, message=""):
    """Assert that numbers, or arrays of them, agree as fp32 values do."""
    expected = np.asarray(expected, np.float64)
    _close(found, expected, 1e-4, np.abs(expected).max(initial=0.0), message)


def gradients(found, expected, message="", of=None):
    """Assert that gradients agree, row by row: the last axis is a vocabulary, a hidden size or the like.

    `of`: rows that they are differences of, if those are greater.
    """
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected if of is None else of).max(-1, keepdims=True, initial=0.0)
    _close(found, expected, 1e-3, scale, message)


def _close(found, expected, rtol, scale, message):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape, f"{message} {found.shape} {expected.shape}"
    allowed = np.where(np.isfinite(expected), rtol * np.abs(expected) + ROUNDING * np.minimum(scale, 1.0), 0.0)
    wrong = ~(np.abs(found - expected) <= allowed) & (found != expected)
    if wrong.any():
        excess = np.where(wrong, np.abs(found - expected) / (allowed + 1e-300), 0)
        at = np.unravel_index(np.argmax(excess), wrong.shape)
        raise AssertionError(
            f"{message} {wrong.sum()} of {wrong.size} differ; at {at}: {found[at]!r}, expected {expected[at]!r}"
        )


def model_kinds(folder: Path) -> dict[str, str]:
    """The model kind of each tokenizer that some file of the golden folder names with one (`model_kind_<side>`)."""
    kinds = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for entry in content if isinstance(content, list) else [content]:
            if isinstance(entry, dict):
                sides = [key.removeprefix("model_kind_") for key in entry if key.startswith("model_kind_")]
                names = {side: entry.get(side, entry.get(f"{side}_vocab")) for side in sides}
                kinds |= {name: entry[f"model_kind_{side}"] for side, name in names.items() if name}
    return kinds
