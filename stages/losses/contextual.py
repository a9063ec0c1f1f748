"""Pairs of tokens that CDM adds to a map between vocabularies at one place, by the similarity of their strings."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from stages.alignment.pair import Pair
from stages.losses.mapped import first_of_same
from stages.losses.token_alignment import is_part, texts_of
from stages.tokenization.view import ByteView

THRESHOLD = 0.3  # edit distance divided by the sum of both lengths, as in the paper
_BLOCK = 2**20  # pairs looked at together
_BITS = 64


class Links(NamedTuple):
    """Events that tokens of R places belong to; K, the number of teacher tokens, is none.

    `teacher` int64 [R, K]: of each teacher token. `student` int64 [R, K + k]: of the base map's token of each teacher
    token, and of each of the student's likeliest. A student token has an event in one of its columns only.
    """

    teacher: np.ndarray
    student: np.ndarray


class Letters(NamedTuple):
    """Of each token `length` int64, its characters, 0 where there is nothing to compare; `kinds` uint64: which ones."""

    length: np.ndarray
    kinds: np.ndarray


def link(
    pair: Pair, teacher_ids: np.ndarray, student_ids: np.ndarray, to_student: np.ndarray, to_teacher: np.ndarray
) -> Links:
    """Return the events of the teacher's likeliest tokens [R, K] and the student's [R, k] at R places.

    A teacher token stands with its token of the base map `to_student`, or without one with the nearest of
    `student_ids`. Then a student token that nothing stands with joins the event of its token of the base map
    `to_teacher`, if that is among `teacher_ids`, or without one in that map the nearest of them. Of equally near ones
    the likelier counts. The cost is that of one edit distance for each pair of tokens that a bound from lengths and
    letters does not rule out; a batch counts each pair once.
    """
    columns = teacher_ids.shape[1]
    target = to_student[teacher_ids]
    source = np.arange(columns)[None, :].repeat(len(teacher_ids), 0)
    row, column = np.nonzero(target < 0)
    found = nearest_in_context((pair.teacher, pair.student), teacher_ids[row, column], student_ids[row])
    row, column, found = row[found >= 0], column[found >= 0], found[found >= 0]
    target[row, column] = student_ids[row, found]
    source[row, column] = columns + found

    event = first_of_same(target)
    event[target < 0] = columns
    student = np.full((len(teacher_ids), columns + student_ids.shape[1]), columns)
    row, column = np.nonzero(event == np.arange(columns))
    student[row, source[row, column]] = column

    first = np.arange(len(target))[:, None] * len(to_teacher)  # keys of a row's student tokens start here
    free = ~np.isin(first + student_ids, (first + target)[target >= 0])
    known = to_teacher[student_ids]
    row, column = np.nonzero(free & (known >= 0))
    found = column_of(teacher_ids, row, known[row, column])
    row, column, found = row[found >= 0], column[found >= 0], found[found >= 0]
    event[row, found] = np.minimum(event[row, found], found)  # a teacher token without an event begins one
    student[row, columns + column] = event[row, found]

    row, column = np.nonzero(free & (known < 0))
    found = nearest_in_context((pair.student, pair.teacher), student_ids[row, column], teacher_ids[row])
    row, column, found = row[found >= 0], column[found >= 0], found[found >= 0]
    student[row, columns + column] = event[row, found]
    return Links(event, student)


def column_of(ids: np.ndarray, row: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return int64 [M]: the column of `ids` [R, K] in which each `row` holds the id `wanted`, -1 where it does not."""
    wide = max(int(ids.max(initial=0)), int(wanted.max(initial=0))) + 1
    keys = (np.arange(len(ids))[:, None] * wide + ids).ravel()
    order = np.argsort(keys, kind="stable")
    asked = row * wide + wanted
    place = np.minimum(np.searchsorted(keys, asked, sorter=order), max(len(keys) - 1, 0))
    found = order[place] if len(keys) else np.zeros(0, np.int64)
    return np.where(keys[found] == asked, found % ids.shape[1], -1)


def nearest_in_context(
    views: tuple[ByteView, ByteView], ids: np.ndarray, candidates: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """Return int64 [M]: the column of the candidate that is nearest to each token; -1 for none.

    `ids` int64 [M] of the first view, `candidates` int64 [M, c] of the second. Near is a normalised distance below the
    threshold; of equally near candidates the first is taken. Tokens without characters, and parts of characters, are
    near to nothing.
    """
    if not candidates.size:
        return np.full(len(ids), -1, np.int64)
    size = max(1, _BLOCK // candidates.shape[1])
    parts = [
        _nearest(views, ids[start : start + size], candidates[start : start + size], threshold)
        for start in range(0, len(ids), size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@lru_cache(maxsize=8)
def letters_of(view: ByteView) -> Letters:
    """Return the lengths and letters of a tokenizer's tokens without their spaces."""
    texts = ["" if is_part(text) else text for text in texts_of(view)]
    kinds = [sum(1 << bit for bit in {ord(letter) % _BITS for letter in text}) for text in texts]
    return Letters(np.array([len(text) for text in texts], np.int64), np.array(kinds, np.uint64))


def _nearest(views: tuple[ByteView, ByteView], ids: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    own, other = (letters_of(view) for view in views)
    length, theirs = own.length[ids][:, None], other.length[candidates]
    kinds, their_kinds = own.kinds[ids][:, None], other.kinds[candidates]
    # Each letter that only one side has costs an edit, and so does each place that only one side has.
    least = np.maximum(np.bitwise_count(kinds & ~their_kinds), np.bitwise_count(their_kinds & ~kinds))
    least = np.maximum(least, np.abs(length - theirs))
    row, column = np.nonzero((least < threshold * (length + theirs)) & (length > 0) & (theirs > 0))
    wide = np.int64(len(other.length))
    pairs, inverse = np.unique(ids[row] * wide + candidates[row, column], return_inverse=True)
    first, second = np.divmod(pairs, wide)
    texts = texts_of(views[0]), texts_of(views[1])
    strings = [[text[i] for i in side.tolist()] for text, side in zip(texts, (first, second), strict=True)]
    distance = cpdist(*strings, scorer=Levenshtein.distance, dtype=np.int32) if len(pairs) else np.zeros(0)
    normalised = np.full(candidates.shape, np.inf)
    normalised[row, column] = (distance / (own.length[first] + other.length[second]))[inverse]
    best = normalised.argmin(1)
    return np.where(normalised[np.arange(len(ids)), best] < threshold, best, -1)
