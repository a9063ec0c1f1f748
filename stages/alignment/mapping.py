"""MinED: for each token of one vocabulary, the nearest token of another by Levenshtein distance over bytes.

The distances are those of tokenkit's `baseline_utils.compute_mined_mapping`; ties fall otherwise: to the longest common
prefix, then to the lowest id. Specials are matched by role, never by spelling.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stages.tokenization.view import ByteView

# What stands for a special token that the teacher has none of.
_STAND_IN = {"bos": "eos", "pad": "eos", "end_of_turn": "eos"}
_CELLS = 1 << 24  # distances held at once, 2 bytes each


class Match(NamedTuple):
    """The teacher token for a student token; `kind` is exact, mined, special or none (teacher_id -1, distance -1)."""

    teacher_id: int
    distance: int
    kind: str


def mine(teacher: ByteView, student: ByteView) -> Iterator[Match]:
    """Yield a Match for each student id, in order. Exact: every pair that could be nearest is compared."""
    known = teacher.id_of_bytes
    missing = [token for token in dict.fromkeys(student.token_bytes) if token and token not in known]
    nearest = dict(zip(missing, nearest_tokens(missing, known), strict=True))
    for identity, token in enumerate(student.token_bytes):
        if token is None:
            yield _special(teacher, student, identity)
        elif token in known:
            yield Match(known[token], 0, "exact")
        elif token in nearest:
            yield Match(*nearest[token], "mined")
        else:
            yield Match(-1, -1, "none")


def nearest_tokens(queries: Sequence[bytes], choices: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    """Yield (id, Levenshtein distance in bytes) of the choice nearest to each query; memory is bounded."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    # Latin-1 maps each byte to one character. Sorted, the choices that share most of a query's start are neighbours.
    spelled = sorted(token.decode("latin-1") for token in choices)
    ids = np.array([choices[text.encode("latin-1")] for text in spelled])
    rows = max(1, _CELLS // max(1, len(spelled)))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1
    for start in range(0, len(queries), rows):
        batch = [query.decode("latin-1") for query in queries[start : start + rows]]
        distances = cdist(batch, spelled, scorer=Levenshtein.distance, dtype=np.uint16, workers=workers)
        least = distances.min(axis=1)
        for query, row, distance in zip(batch, distances, least, strict=True):
            yield _first_of(np.flatnonzero(row == distance), query, spelled, ids), int(distance)


def _first_of(tied: np.ndarray, query: str, spelled: list[str], ids: np.ndarray) -> int:
    """Return the id, among tied choices (sorted positions), with the longest common prefix, then the lowest id."""
    place = int(np.searchsorted(tied, bisect_left(spelled, query)))
    around = [spelled[i] for i in tied[max(0, place - 1) : place + 1]]
    prefix = query[: max(_common(query, text) for text in around)]
    begin = bisect_left(spelled, prefix)
    end = bisect_left(spelled, prefix + "\U0010ffff")
    return int(ids[tied[np.searchsorted(tied, begin) : np.searchsorted(tied, end)]].min())


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _special(teacher: ByteView, student: ByteView, identity: int) -> Match:
    """Match a special token by role, by a stand-in for the role, or by its text if it has no role."""
    role = student.role_of.get(identity)
    found = teacher.roles.get(role, teacher.roles.get(_STAND_IN.get(role, "")))
    if found is None and identity in student.special_ids:
        found = teacher.special_named(student.string_of(identity))
    return Match(-1, -1, "none") if found is None else Match(found, 0, "special")
