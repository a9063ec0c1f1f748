"""Tokenization bias: what a token boundary rules out in one tokenizer and not in the other.

For a pair (t, s) of tokens of which one's bytes are a suffix of the other's, with the cover dictionaries of
`stages.alignment.covers` and unigram probabilities p(v) proportional to count(v) + smoothing * (sum of counts):

    bias1(t, s) = sum over the keys k of D_T(t) that D_S(s) has not, of p_T(D_T(t)[k])
    bias2(t, s) = the same with the sides exchanged.

Reference: tokenkit, `scripts/compute_tokenizer_info.py`, which computes both dictionaries anew for every pair and calls
the smoothing `additive_smoothing_constant`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.alignment.chunks import align
from stages.alignment.covers import CoverFinder, Covers
from stages.tokenization.encoding import SLOTS_PER_MESSAGE, EncodedBatch
from stages.tokenization.view import ByteView

SMOOTHING = 1e-9  # tokenkit's default
_ROWS = 1 << 20  # entries compared together


class TokenPairs(NamedTuple):
    """Token pairs: `teacher_id` and `student_id`, int64 [n], sorted by both."""

    teacher_id: np.ndarray
    student_id: np.ndarray


def suffix_pairs(teacher: ByteView, student: ByteView) -> TokenPairs:
    """Return all pairs of which one token's bytes are a suffix of the other's.

    Every id with bytes counts, byte fallbacks and other ids of the same bytes too; specials have no bytes.
    """
    teachers, students = _ids_of(teacher), _ids_of(student)
    keys = [
        t << 32 | s
        for token, ids in teachers.items()
        for cut in range(len(token))
        for s in students.get(token[cut:], ())
        for t in ids
    ]
    keys += [
        t << 32 | s
        for token, ids in students.items()
        for cut in range(1, len(token))
        for t in teachers.get(token[cut:], ())
        for s in ids
    ]
    return _pairs(np.sort(np.array(keys, np.int64)))


class ChunkEnds:
    """The pairs of last tokens at the boundaries that both tokenizations of a text share, added batch by batch.

    Exactly the pairs that an alignment of the same examples asks a BiasTable for, and all of them are suffix pairs.
    Examples that a tokenizer cannot spell are left out, as in training.
    """

    def __init__(self, teacher: ByteView, student: ByteView) -> None:
        self._views = (teacher, student)
        self._keys = np.zeros(0, np.int64)

    def add(self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Add examples, each a list of slots as `ByteView.encode_examples` takes them."""
        batches = [view.encode_examples(slots_per_example) for view in self._views]
        *chunks, n_chunks = align(*batches, scored=False)
        exact = batches[0].exact & batches[1].exact
        last = [_last_tokens(batch, chunk, n_chunks) for batch, chunk in zip(batches, chunks, strict=True)]
        kept = (batches[0].slot[last[0]] % SLOTS_PER_MESSAGE == 2) & np.repeat(exact, n_chunks)
        teacher_id, student_id = (batch.ids[at[kept]].astype(np.int64) for batch, at in zip(batches, last, strict=True))
        self._keys = np.union1d(self._keys, teacher_id << 32 | student_id)

    def pairs(self) -> TokenPairs:
        """Return the pairs found so far."""
        return _pairs(self._keys)


def biases(
    teacher: ByteView,
    student: ByteView,
    counts: tuple[np.ndarray, np.ndarray],
    pairs: TokenPairs,
    smoothing: float = SMOOTHING,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (bias1, bias2) of suffix pairs, float64 [n] each; `counts` int64 [vocab] of teacher and student tokens.

    1 where either token is nothing but white space. Sums are of integers, so they do not depend on an order.
    """
    views = (teacher, student)
    numbers: dict[bytes, int] = {}
    sides, rows = [], []
    for view, count, ids in zip(views, counts, pairs, strict=True):
        used, row = np.unique(ids, return_inverse=True)
        covers = CoverFinder(view).find([view.token_bytes[i] for i in used])
        sides.append(_Side(covers, _number_keys(view, covers, numbers), count[covers.token]))
        rows.append(row)
    left, right = sides
    sizes = [side.covers.sizes()[row] for side, row in zip(sides, rows, strict=True)]
    common = np.zeros((len(pairs.teacher_id), 3), np.int64)  # keys, teacher counts, student counts
    # The smaller dictionary of each pair is looked up in the greater.
    swap = sizes[0] < sizes[1]
    common[~swap] = _common(left, right, rows[0][~swap], rows[1][~swap], len(numbers))
    common[swap] = _common(right, left, rows[1][swap], rows[0][swap], len(numbers))[:, [0, 2, 1]]
    blank = np.zeros(len(common), bool)
    result = []
    for k, (view, count, ids) in enumerate(zip(views, counts, pairs, strict=True)):
        totals = sides[k].count_sums()[rows[k]]
        result.append(probability_mass(totals - common[:, k + 1], sizes[k] - common[:, 0], count, smoothing))
        blank |= _is_blank(view)[ids]
    return np.where(blank, 1.0, result[0]), np.where(blank, 1.0, result[1])


def probability_mass(
    occurrences: np.ndarray, tokens: np.ndarray, counts: np.ndarray, smoothing: float = SMOOTHING
) -> np.ndarray:
    """Return the smoothed unigram probability of so many distinct tokens that occur so often together.

    `counts` int64 [vocab]: occurrences of every token. A text without any token leaves nothing to tell: all are alike.
    """
    total = int(counts.sum())
    if not total:
        return tokens / len(counts)
    return (occurrences / total + smoothing * tokens) / (1 + smoothing * len(counts))


class _Side(NamedTuple):
    """One tokenizer's cover dictionaries, with the number of each entry's key and the count of its token."""

    covers: Covers
    key: np.ndarray
    count: np.ndarray

    def count_sums(self) -> np.ndarray:
        """Return int64 [strings]: how often the tokens of each dictionary occur."""
        covers = self.covers
        entries = np.concatenate(([0], np.cumsum(self.count, dtype=np.int64)))
        groups = np.diff(entries[covers.group_offsets])[covers.groups]
        return np.diff(np.concatenate(([0], np.cumsum(groups)))[covers.string_offsets])


def _number_keys(view: ByteView, covers: Covers, numbers: dict[bytes, int]) -> np.ndarray:
    """Return int32 [entries]: the number of each entry's key; `numbers` grows, so that both sides share it."""
    starts, table = np.zeros(view.vocab_size, np.int64), []
    for token in np.unique(covers.token).tolist():
        content = view.token_bytes[token]
        starts[token] = len(table) - 1
        table += [numbers.setdefault(content[begin:], len(numbers)) for begin in range(1, len(content))]
    inside = np.repeat(covers.inside, np.diff(covers.group_offsets))
    return np.array(table, np.int32)[starts[covers.token] + inside] if table else np.zeros(0, np.int32)


def _common(large: _Side, small: _Side, large_row: np.ndarray, small_row: np.ndarray, keys: int) -> np.ndarray:
    """Return int64 [n, 3] for pairs of dictionaries: common keys, and how often their tokens occur on either side."""
    result = np.zeros((len(large_row), 3), np.int64)
    order = np.argsort(large_row, kind="stable")
    bounds = np.flatnonzero(np.diff(large_row[order], prepend=-1, append=-1))
    sizes = small.covers.sizes()
    table = np.zeros(keys, np.int64)  # count + 1 of the keys of one large dictionary
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        places = order[begin:end]
        places = places[sizes[small_row[places]] > 0]
        if not len(places):
            continue
        entries = large.covers.entries(large_row[places[:1]])
        table[large.key[entries]] = large.count[entries] + 1
        for part in np.array_split(places, 1 + int(sizes[small_row[places]].sum()) // _ROWS):
            looked_up = small.covers.entries(small_row[part])
            found = table[small.key[looked_up]]
            hit = found > 0
            starts = np.cumsum(sizes[small_row[part]]) - sizes[small_row[part]]
            n = np.add.reduceat(hit, starts, dtype=np.int64)
            result[part, 0] = n
            result[part, 1] = np.add.reduceat(found, starts) - n
            result[part, 2] = np.add.reduceat(small.count[looked_up] * hit, starts)
        table[large.key[entries]] = 0
    return result


def _last_tokens(batch: EncodedBatch, chunks: np.ndarray, n_chunks: np.ndarray) -> np.ndarray:
    """Return int64 [all chunks]: the place of each chunk's last token, example by example."""
    bases = np.repeat(np.cumsum(n_chunks) - n_chunks, np.diff(batch.offsets))
    inside = np.flatnonzero(chunks >= 0)
    return inside[np.flatnonzero(np.diff((bases + chunks)[inside], append=-1))]


def _is_blank(view: ByteView) -> np.ndarray:
    """Return bool [vocab]: the token is nothing but white space."""
    blank = (token is not None and not token.decode(errors="replace").strip() for token in view.token_bytes)
    return np.fromiter(blank, bool, view.vocab_size)


def _ids_of(view: ByteView) -> dict[bytes, list[int]]:
    ids: dict[bytes, list[int]] = {}
    for identity, token in enumerate(view.token_bytes):
        if token:
            ids.setdefault(token, []).append(identity)
    return ids


def _pairs(keys: np.ndarray) -> TokenPairs:
    return TokenPairs(keys >> 32, keys & 0xFFFFFFFF)
