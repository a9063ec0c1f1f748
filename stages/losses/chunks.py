"""Chunk tables: which tokens of teacher and student are scored against each other, and how often.

Everything here depends on tokens and teacher signals only, so counts are exact before any student pass.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunks:
    """C chunks of a flat micro-batch, each with scored tokens on both sides.

    `teacher`, `student`: int64[tokens], the chunk of every token, -1 for none. `teacher_end`, `student_end`:
    int64[C], the row of the chunk's last token, which predicts what follows the chunk. `count`: int64[C], teacher
    tokens.
    """

    teacher: np.ndarray
    student: np.ndarray
    teacher_end: np.ndarray
    student_end: np.ndarray
    count: np.ndarray


def scored_chunks(chunk: np.ndarray, loss: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return chunk ids with -1 where a token is not a target: masked, or the first of its example."""
    scored = np.where(loss, chunk, -1).astype(np.int64)
    scored[offsets[:-1][offsets[:-1] < offsets[1:]]] = -1
    return scored


def merge_chunks(
    teacher: np.ndarray,
    student: np.ndarray,
    example: np.ndarray,
    boundary: np.ndarray | None = None,
    threshold: float | None = None,
) -> Chunks:
    """Return the chunks that are scored, joined where the teacher sees no boundary.

    `teacher`, `student`: int64[tokens] chunk ids of the micro-batch, ascending, -1 for none, masks already applied.
    `example`: int[C], the example of each chunk id. A chunk without a scored token on either side is dropped.
    With a `threshold`, a chunk is joined to the next one of its example unless exp(`boundary`) at the row of its
    last teacher token is above the threshold; `boundary` is the teacher's log boundary mass, float[tokens]. Dropped
    chunks end a merged chunk. tokenkit `merge_by_space_prob`; there dropped chunks take part with the boundary mass
    of row 0 and the merged counts are merged a second time for the denominator.
    """
    number = len(example)
    count = np.bincount(teacher[teacher >= 0], minlength=number)
    valid = (count > 0) & (np.bincount(student[student >= 0], minlength=number) > 0)
    teacher_end, student_end = run_ends(teacher, number), run_ends(student, number)
    kept = np.flatnonzero(valid)
    if threshold is None or not len(kept):
        group = np.arange(len(kept))
    else:
        assert boundary is not None
        breaks = np.exp(boundary[teacher_end[kept]].astype(np.float64)) > threshold
        starts = breaks[:-1] | (np.diff(kept) != 1) | (np.diff(example[kept]) != 0)
        group = np.concatenate([[0], np.cumsum(starts)])
    groups = int(group[-1]) + 1 if len(group) else 0
    new_id = np.full(number + 1, -1, dtype=np.int64)
    new_id[kept] = group
    last = np.full(groups, -1, dtype=np.int64)
    last[group] = kept
    merged_count = np.bincount(group, weights=count[kept], minlength=groups).astype(np.int64)
    return Chunks(new_id[teacher], new_id[student], teacher_end[last], student_end[last], merged_count)


def run_ends(chunk: np.ndarray, number: int) -> np.ndarray:
    """Return int64[number]: the end of each chunk's first run of consecutive tokens (0 for an empty chunk).

    Alignment makes chunks of consecutive tokens, so this is the last token; tokenkit reads the boundary of a chunk
    that a mask tears apart at the end of its first run, and so does this.
    """
    following = np.append(chunk[1:], -2)
    ends = np.flatnonzero((chunk >= 0) & (following != chunk))[::-1]
    result = np.zeros(number, dtype=np.int64)
    result[chunk[ends]] = ends
    return result


def segment_sums(chunk: np.ndarray, observed: np.ndarray, number: int) -> np.ndarray:
    """Return float64[number]: log-probabilities of each chunk's tokens, read at the row before each token."""
    tokens = np.flatnonzero(chunk >= 0)
    return np.bincount(chunk[tokens], weights=observed[tokens - 1].astype(np.float64), minlength=number)
