"""Align two tokenizations of one batch: a chunk id per token, from byte coordinates alone.

tokenkit (`align.py`) walks both token lists and compares strings; here boundaries are coordinates that both sides
lay out alike (`stages.tokenization.encoding`), so one pass of numpy over the flat batch does it, in O(tokens + bytes).
"""

from dataclasses import dataclass

import numpy as np

from stages.tokenization.encoding import SCALE, EncodedBatch

KINDS = ("unconstrained", "space", "unbiased", "greedy")
_SPACE = 0x20
_BOUNDARY_BYTES = np.frombuffer(b" \t\n", np.uint8)


@dataclass(frozen=True)
class BiasTable:
    """Token pairs (teacher id, student id) at which a chunk may not end: one of their two biases is over the threshold.

    `keys` int64, sorted: teacher id << 32 | student id.
    """

    keys: np.ndarray

    @classmethod
    def over(
        cls, teacher_id: np.ndarray, student_id: np.ndarray, bias1: np.ndarray, bias2: np.ndarray, threshold: float
    ) -> "BiasTable":
        """Make the table from sparse bias matrices given as parallel arrays; pairs not listed have bias 0."""
        over = (bias1 > threshold) | (bias2 > threshold)
        return cls(np.sort(_pair_keys(np.asarray(teacher_id)[over], np.asarray(student_id)[over])))

    def accepts(self, teacher_id: np.ndarray, student_id: np.ndarray) -> np.ndarray:
        """Return bool [n]: whether a chunk may end at each pair of last tokens."""
        if not len(self.keys):
            return np.ones(len(teacher_id), bool)
        keys = _pair_keys(teacher_id, student_id)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.keys[at] != keys


@dataclass(frozen=True)
class _Side:
    """One side of an alignment; a run is a slot that has tokens."""

    batch: EncodedBatch
    key: np.ndarray  # int64 [N] coordinate in the whole batch
    example: np.ndarray  # int64 [N] index of the example
    run: np.ndarray  # int64 [N] index of the run
    last: np.ndarray  # int64 [runs] last token of each run


def align(
    teacher: EncodedBatch,
    student: EncodedBatch,
    kind: str = "unconstrained",
    bias: BiasTable | None = None,
    scored: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (chunk of each teacher token int32 [Nt], of each student token int32 [Ns], chunks per example int32 [B]).

    Chunk ids count from 0 within each example; -1 is none. Both sides of a chunk cover the same bytes of one slot.
    Kinds, where "slot end" always ends a chunk:
    - unconstrained: the shortest chunks.
    - space: chunks end where the next token of both sides starts with a space (tokenkit's `alm_space`).
    - unbiased: chunks end where `bias` accepts the last tokens of both sides.
    - greedy: chunks end where the next token of both sides starts with a space, tab or newline; a slot without such a
      place has the shortest chunks.
    A slot that has no tokens on one side gives the other side's tokens -1. With `scored`, the rule of `drop_unscored`
    is applied. ValueError when the batches do not hold the same examples, or for an unknown kind.
    """
    if not np.array_equal(teacher.widths, student.widths):
        raise ValueError("teacher and student batch do not hold the same examples")
    bases = np.cumsum(teacher.widths) - teacher.widths
    size = int(teacher.widths.sum()) // SCALE + 1
    left, right = _side(teacher, bases), _side(student, bases)
    matched_left = _matches(left, right, size)
    matched_right = _matches(right, left, size)
    ends_left, ends_right = np.flatnonzero(matched_left), np.flatnonzero(matched_right)
    accepted = _accepted(left, right, ends_left, ends_right, kind, bias)
    chunks_left = _number(left, ends_left[accepted], matched_left)
    chunks_right = _number(right, ends_right[accepted], matched_right)
    counts = np.bincount(left.example[ends_left[accepted]], minlength=len(teacher.widths)).astype(np.int32)
    if scored:
        return drop_unscored(chunks_left, chunks_right, counts, teacher.offsets, student.offsets)
    return chunks_left, chunks_right, counts


def drop_unscored(
    chunk_teacher: np.ndarray,
    chunk_student: np.ndarray,
    n_chunks: np.ndarray,
    offsets_teacher: np.ndarray,
    offsets_student: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the chunks away that hold the first token of an example on either side, which no model predicts.

    Such a chunk is an example's first. Arguments and result as `align` returns them.
    """
    drop = np.zeros(len(n_chunks), bool)
    for chunks, offsets in ((chunk_teacher, offsets_teacher), (chunk_student, offsets_student)):
        filled = np.flatnonzero(offsets[1:] > offsets[:-1])
        drop[filled] |= chunks[offsets[filled]] == 0
    if not drop.any():
        return chunk_teacher, chunk_student, n_chunks
    results = []
    for chunks, offsets in ((chunk_teacher, offsets_teacher), (chunk_student, offsets_student)):
        less = np.repeat(drop, np.diff(offsets))
        results.append(np.maximum(chunks - less.astype(np.int32), -1))
    return results[0], results[1], (n_chunks - drop).astype(np.int32)


def _side(batch: EncodedBatch, bases: np.ndarray) -> _Side:
    counts = np.diff(batch.offsets)
    example = np.repeat(np.arange(len(counts)), counts)
    new = np.ones(len(batch.ids), bool)
    new[1:] = (batch.slot[1:] != batch.slot[:-1]) | (example[1:] != example[:-1])
    firsts = np.flatnonzero(new)
    last = np.concatenate((firsts[1:] - 1, [len(batch.ids) - 1])) if len(firsts) else firsts
    return _Side(batch, batch.ends + np.repeat(bases, counts), example, np.cumsum(new) - 1, last)


def _matches(side: _Side, other: _Side, size: int) -> np.ndarray:
    """Return bool [N]: the token ends where a token of the other side ends."""
    there = np.zeros(size, bool)
    there[other.key[other.key % SCALE == 0] // SCALE] = True
    return (side.key % SCALE == 0) & there[side.key // SCALE]


def _accepted(
    left: _Side, right: _Side, ends_left: np.ndarray, ends_right: np.ndarray, kind: str, bias: BiasTable | None
) -> np.ndarray:
    """Return bool [matches]: which common boundaries end a chunk."""
    if kind == "unconstrained":
        return np.ones(len(ends_left), bool)
    # A slot ends on both sides at once or on neither, except a slot that only one side has.
    slot_end = _is_last(left)[ends_left] | _is_last(right)[ends_right]
    if kind == "unbiased":
        if bias is None:
            raise ValueError("alignment of kind unbiased needs bias statistics")
        return slot_end | bias.accepts(left.batch.ids[ends_left], right.batch.ids[ends_right])
    next_left, next_right = _next_first(left.batch, ends_left), _next_first(right.batch, ends_right)
    if kind == "space":
        return slot_end | ((next_left == _SPACE) & (next_right == _SPACE))
    if kind != "greedy":
        raise ValueError(f"unknown chunk kind {kind!r}; known are {', '.join(KINDS)}")
    word_end = np.isin(next_left, _BOUNDARY_BYTES) & np.isin(next_right, _BOUNDARY_BYTES) & ~slot_end
    run = left.run[ends_left]
    without = np.bincount(run, word_end, len(left.last))[run] == 0
    return slot_end | word_end | without


def _is_last(side: _Side) -> np.ndarray:
    last = np.zeros(len(side.key), bool)
    last[side.last] = True
    return last


def _next_first(batch: EncodedBatch, ends: np.ndarray) -> np.ndarray:
    """Return the first byte of the token after each, 0 after the last."""
    return np.append(batch.first, np.uint8(0))[ends + 1]


def _number(side: _Side, chunk_ends: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """Return the chunk id of each token, from the tokens that end a chunk."""
    ending = np.zeros(len(side.key), np.int32)
    ending[chunk_ends] = 1
    before = np.cumsum(ending, dtype=np.int32) - ending
    at_start = np.append(before, np.int32(0))[side.batch.offsets[:-1]]
    chunks = before - np.repeat(at_start, np.diff(side.batch.offsets))
    # A slot that both sides have ends in a common boundary; one that does not is one side's alone.
    chunks[~matched[side.last][side.run]] = -1
    return chunks


def _pair_keys(teacher_id: np.ndarray, student_id: np.ndarray) -> np.ndarray:
    return np.asarray(teacher_id, np.int64) << 32 | np.asarray(student_id, np.int64)
