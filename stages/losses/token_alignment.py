"""Alignment of two token sequences by string distance, as FuseLLM (arXiv 2401.10491), DSKD and CDM align them.

Dynamic time warping over the edit distances of token strings. Both sequences spell the same text, so chunks by bytes
(`stages.alignment.chunks`) are exact and this is not; it is here because these methods are defined by it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from stages.alignment.pair import Pair
from stages.losses.sft import target_rows
from stages.tokenization.view import ByteView

if TYPE_CHECKING:
    from stages.tokenization.encoding import EncodedBatch

_DIAGONAL, _UP, _LEFT = 0, 1, 2
BYTES, SPACE = 0xE000, 0x20


class Path(NamedTuple):
    """Aligned places of B examples, int64 [P] each: by example, then from the first place to the last."""

    example: np.ndarray
    teacher: np.ndarray
    student: np.ndarray


@lru_cache(maxsize=8)
def texts_of(view: ByteView) -> list[str]:
    """Return the text of every token without its spaces; parts of characters are spelled byte by byte.

    A byte b is then the private character U+E000 + b, so that different bytes differ and equal ones do not, as in the
    vocabularies of byte-level tokenizers, whose strings the references compare.
    """
    return [_text(view, identity) for identity in range(view.vocab_size)]


def _text(view: ByteView, identity: int) -> str:
    content = view.token_bytes[identity] or b""
    try:
        content.decode()
    except UnicodeDecodeError:
        return "".join(chr(BYTES + byte) for byte in content if byte != SPACE)
    return view.string_of(identity).replace(" ", "")


def is_part(text: str) -> bool:
    """Return whether `texts_of` gave this text to a part of a character."""
    return bool(text) and BYTES <= ord(text[-1]) < BYTES + 256


def aligned_tokens(batch: "EncodedBatch") -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return what is aligned of a batch, the tokens at rows that predict a trained token.

    (flat rows int64, how many each example has [B], ids int64 of each example.)
    """
    rows = target_rows(batch.loss, batch.offsets)
    ends = np.searchsorted(rows, batch.offsets)
    return rows, np.diff(ends), np.split(batch.ids[rows].astype(np.int64), ends[1:-1])


def token_costs(pair: Pair, teacher: Sequence[np.ndarray], student: Sequence[np.ndarray]) -> np.ndarray:
    """Return int32 [B, n, m]: edit distances between the tokens of each example, 0 in the padding.

    `teacher`, `student`: ids of each example. Tokens that stand exactly for each other, specials of one role among
    them, cost nothing.
    """
    assert pair.to_teacher is not None
    texts = texts_of(pair.teacher), texts_of(pair.student)
    shape = (len(teacher), max(map(len, teacher), default=0), max(map(len, student), default=0))
    costs = np.zeros(shape, np.int32)
    for cost, rows, columns in zip(costs, teacher, student, strict=True):
        if len(rows) and len(columns):
            strings = [[text[i] for i in ids.tolist()] for text, ids in zip(texts, (rows, columns), strict=True)]
            found = cdist(*strings, scorer=Levenshtein.distance, dtype=np.int32)
            same = rows[:, None] == pair.to_teacher.exact[columns][None, :]
            cost[: len(rows), : len(columns)] = np.where(same, 0, found)
    return costs


def warp(cost: np.ndarray, teacher_sizes: np.ndarray, student_sizes: np.ndarray) -> tuple[Path, np.ndarray]:
    """Return the cheapest path through each cost matrix and its cost [B]; of equal ones diagonal, then up, then left.

    `cost` [B, n, m], example b has `teacher_sizes[b]` rows and `student_sizes[b]` columns; the rest is padding. Up is
    to the teacher token before, left to the student token before. An example with an empty side has no path.
    All examples go at once, one anti-diagonal after another: n + m steps over [B, n], and back in as many.
    """
    full = (teacher_sizes > 0) & (student_sizes > 0)
    examples = np.flatnonzero(full)
    totals = np.zeros(len(cost), cost.dtype)
    if not len(examples):
        none = np.zeros(0, np.int64)
        return Path(none, none, none), totals
    rows, columns = teacher_sizes[examples] - 1, student_sizes[examples] - 1
    sums, moves = _forward(cost[examples])
    at = np.arange(len(examples))
    totals[examples] = sums[at, rows, columns]
    trail = []
    live = np.ones(len(examples), bool)
    while live.any():
        trail.append((np.where(live, rows, -1), columns))
        move = moves[at, rows, columns]
        live = live & ((rows > 0) | (columns > 0))
        rows = rows - (live & (move != _LEFT))
        columns = columns - (live & (move != _UP))
    teacher, student = (np.stack(side[::-1], 1) for side in zip(*trail, strict=True))
    used = teacher >= 0
    return Path(np.repeat(examples, used.sum(1)), teacher[used], student[used]), totals


def segments(path: Path, teacher_sizes: np.ndarray, student_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (segment of each teacher place, of each student place, how many), places of all examples in a row.

    A segment is what a path joins without a diagonal step: one token with one, or with several of the other side.
    Places without a path have segment -1.
    """
    new = np.ones(len(path.example), bool)
    new[1:] = path.example[1:] != path.example[:-1]
    new[1:] |= (path.teacher[1:] != path.teacher[:-1]) & (path.student[1:] != path.student[:-1])
    segment = np.cumsum(new) - 1
    sides = []
    for place, sizes in zip(
        flat_places(path, teacher_sizes, student_sizes), (teacher_sizes, student_sizes), strict=True
    ):
        side = np.full(int(sizes.sum()), -1, np.int64)
        side[place] = segment
        sides.append(side)
    return sides[0], sides[1], int(new.sum())


def flat_places(path: Path, teacher_sizes: np.ndarray, student_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (teacher place, student place) of each step of a path, int64 [P], places of all examples in a row."""
    sides = ((path.teacher, teacher_sizes), (path.student, student_sizes))
    teacher, student = ((np.cumsum(sizes) - sizes)[path.example] + place for place, sizes in sides)
    return teacher, student


def _forward(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (least sums, the move each came by, int8), [B, n, m] both."""
    batch, n, m = cost.shape
    width = max(m, 2)  # one column has no anti-diagonal stride
    flat = np.zeros((batch, n, width), cost.dtype)
    flat[:, :, :m] = cost
    flat = flat.reshape(batch, n * width)
    moves = np.zeros(flat.shape, np.int8)
    endless = np.iinfo(cost.dtype).max // 2 if cost.dtype.kind == "i" else np.inf
    before = np.full((batch, n + 1), endless, cost.dtype)  # the two anti-diagonals before, place 0 is outside
    last = np.full((batch, n + 1), endless, cost.dtype)
    for diagonal in range(n + width - 1):
        low, high = max(0, diagonal - width + 1), min(n - 1, diagonal) + 1
        start = low * width + diagonal - low
        cells = slice(start, start + (high - low - 1) * (width - 1) + 1, width - 1)
        skew, up, left = before[:, low:high], last[:, low:high], last[:, low + 1 : high + 1]
        best = np.minimum(np.minimum(skew, up), left)
        moves[:, cells] = np.where(skew == best, _DIAGONAL, np.where(up == best, _UP, _LEFT))
        if diagonal:
            flat[:, cells] += best
        before, last = last, np.full_like(last, endless)
        last[:, low + 1 : high + 1] = flat[:, cells]
    shape = (batch, n, width)
    return flat.reshape(shape)[:, :, :m], moves.reshape(shape)[:, :, :m]
