"""What of a mapping is worth a look: the best and the worst matches, and the unreliable ones that are used most."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.schemas import COUNTS
from stages.artifacts.tables import read_table


def mined(rows: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """Return the mined rows of a mapping (schema MAPPING, side "student", or REVERSE_MAPPING), best first."""
    found = (row for row in rows if row["kind"] == "mined")
    return sorted(found, key=lambda row: (row["normalised_distance"], row["distance"], row[f"{side}_id"]))


def uses(counts: Iterable[Path], side: str, size: int) -> np.ndarray | None:
    """Return int64 [size]: how often each token of a side occurs, over some counts.parquet; None if there are none."""
    total = None
    for path in counts:
        table = read_table(path, COUNTS)
        of_side = np.array(table["side"].to_pylist()) == side
        found = np.zeros(size, np.int64)
        found[table["id"].to_numpy()[of_side]] = table["count"].to_numpy()[of_side]
        total = found if total is None else total + found
    return total


def unreliable(rows: list[dict[str, Any]], side: str, used: np.ndarray) -> list[dict[str, Any]]:
    """Return the mined rows that are not reliable but used, with their "uses", most used first."""
    found = [row | {"uses": int(used[row[f"{side}_id"]])} for row in mined(rows, side) if not row["reliable"]]
    return sorted((row for row in found if row["uses"]), key=lambda row: (-row["uses"], row[f"{side}_id"]))
