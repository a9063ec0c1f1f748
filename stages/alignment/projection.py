"""The sparse projection W of X-Token: teacher tokens, with weights, for each student token.

W = A + B: row s of A holds the pieces that the teacher's tokenizer cuts student token s into, column t of B those that
the student's tokenizer cuts teacher token t into; piece i weighs .9 * .1^i, divided by the sum over the pieces. The
heaviest entries of each row are kept (of equal ones the lower teacher id) and divided by their sum, so that W^T q is a
distribution if q is. Tokens that both vocabularies hold belong to each other alone, with weight 1.

- Specials are matched by role, with weight 1. X-Token compares their spelling, by which `<|im_start|>` is nearer to
  `<|im_end|>` than `</s>` is.
- Bytes that are no UTF-8 cannot be encoded: they are cut into the fewest tokens, at worst one for each byte.
- A student token that the teacher cannot spell, and an id without a token, has no row.
"""

from collections.abc import Sequence

import numpy as np

from stages.alignment.mapping import Match
from stages.tokenization.spelling import Vocabulary, decompose
from stages.tokenization.view import ByteView

ENTRIES = 4  # kept for each student token, as X-Token does at run time


def projection(
    teacher: ByteView, student: ByteView, matches: Sequence[Match], reverse: Sequence[Match]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (student ids, teacher ids, weights float64), sorted by student id, then by weight, heaviest first.

    `matches` are those of the student's tokens, `reverse` those of the teacher's (`stages.alignment.mapping.mine`).
    """
    students, pieces, weights = _weighted_pieces(student, teacher, matches)
    teachers, reverse_pieces, reverse_weights = _weighted_pieces(teacher, student, reverse)
    rows, columns = np.concatenate((students, reverse_pieces)), np.concatenate((pieces, teachers))
    cells, place = np.unique(rows * teacher.vocab_size + columns, return_inverse=True)
    weights = np.bincount(place, np.concatenate((weights, reverse_weights)), len(cells))
    rows, columns = np.divmod(cells, teacher.vocab_size)
    pinned = np.array([match.kind in ("exact", "special") for match in matches], bool)
    free = ~pinned[rows]
    rows, columns, weights = _heaviest(rows[free], columns[free], weights[free])
    fixed = np.flatnonzero(pinned)
    rows = np.concatenate((rows, fixed))
    columns = np.concatenate((columns, np.array([matches[i].identity for i in fixed.tolist()], np.int64)))
    weights = np.concatenate((weights, np.ones(len(fixed))))
    order = np.argsort(rows, kind="stable")
    return rows[order], columns[order], weights[order]


def _weighted_pieces(
    source: ByteView, target: ByteView, matches: Sequence[Match]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (source ids, target ids, weights) of the pieces of all source tokens that the target does not hold."""
    ids = [i for i, match in enumerate(matches) if source.token_bytes[i] and match.kind != "exact"]
    vocabulary = Vocabulary(
        target.token_bytes,
        duplicate_ids=frozenset(
            i for i, token in enumerate(target.token_bytes) if token and target.id_of_bytes[token] != i
        ),
        encode=lambda texts: target.text_ids(texts, [False] * len(texts)),
    )
    pieces = decompose([source.token_bytes[i] or b"" for i in ids], vocabulary)
    counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
    flat = np.fromiter((piece for part in pieces for piece in part), np.int64, int(counts.sum()))
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(np.arange(len(ids)), counts)
    weights = 0.9 * 0.1**place
    sums = np.bincount(rows, weights, len(ids))
    return np.array(ids, np.int64)[rows], flat, weights / sums[rows]


def _heaviest(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the heaviest entries of each row, divided by their sum."""
    order = np.lexsort((columns, -weights, rows))
    rows, columns, weights = rows[order], columns[order], weights[order]
    kept = np.ones(len(rows), bool)
    kept[ENTRIES:] = rows[ENTRIES:] != rows[:-ENTRIES]
    rows, columns, weights = rows[kept], columns[kept], weights[kept]
    return rows, columns, weights / np.bincount(rows, weights)[rows]
