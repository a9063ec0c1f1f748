"""For each of many byte strings, the two nearest of others by Levenshtein distance: exact, without comparing all pairs.

1. Neighbours in the order of the first 8 bytes, and in that of the last 8 reversed, share a prefix or suffix: the
   distances to a few of them give each query a second-best distance that the answer cannot exceed.
2. The bag distance max(|a|, |b|) - |a ∩ b|, with the multiset of bytes that a and b share, never exceeds the
   Levenshtein distance (Bartolini, Ciaccia and Patella 2002, "String Matching with Metric Trees Using an Approximate
   Distance"). From one query to all choices of a like length it is one subtraction of vectors for each byte, and it
   rules nearly all of them out.
3. What is left is compared with rapidfuzz, in the order of that bound, as long as it can be among the two nearest.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

_NEIGHBOURS = 8  # compared on each side, in either order
_CELLS = 1 << 18  # bag distances held at once: a core's cache
_PAIRS = 1 << 17  # pairs held at once


class Nearest(NamedTuple):
    """The two nearest choices of N queries, the best first.

    index int64 [N, 2], positions among the choices, -1 where there is none; distance int64 [N, 2] in bytes, likewise.
    """

    index: np.ndarray
    distance: np.ndarray


class _Strings(NamedTuple):
    """Byte strings (an array of objects), all their bytes in a row, start and length of each."""

    tokens: np.ndarray
    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def nearest(queries: Sequence[bytes], choices: Sequence[bytes], order: np.ndarray | None = None) -> Nearest:
    """Return the best and the second-best choice for each query; equal choices count as different ones.

    Of choices at the same distance the one with the longest common prefix comes first, then the one with the lower
    `order` [choices], then the earlier one.
    """
    if not queries or not choices:
        return Nearest(*np.full((2, len(queries), 2), -1))
    by_rank = np.argsort(np.zeros(len(choices)) if order is None else order, kind="stable")
    search = _Search(_strings(queries), _strings(np.array(choices, object)[by_rank].tolist()))
    search.compare_neighbours()
    search.compare_within()
    found = search.best < search.nothing
    return Nearest(
        np.where(found, by_rank[search.best % len(choices)], -1), np.where(found, search.distance_of(search.best), -1)
    )


def _strings(tokens: Sequence[bytes]) -> _Strings:
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    flat = np.frombuffer(b"".join(tokens), np.uint8)
    return _Strings(np.array(tokens, object), flat, np.cumsum(lengths) - lengths, lengths)


def _first_bytes(tokens: np.ndarray, step: int) -> np.ndarray:
    """Return the first 8 bytes of each token, backwards with step -1, as one number [n] of the same order."""
    heads = [token[::step][:8].ljust(8, b"\0") for token in tokens.tolist()]
    return np.frombuffer(b"".join(heads), ">u8").astype(np.uint64)


class _Search:
    """A search under way.

    The score of a pair is one number that orders the choices for a query: distance, then common prefix, then the
    choice's own position. `best` int64 [N, 2] are the scores of the two best pairs of each query so far, `reach` int64
    [N] the distance of the second one, which no further pair may exceed.
    """

    def __init__(self, queries: _Strings, choices: _Strings) -> None:
        self.queries, self.choices = queries, choices
        self.longest = int(max(queries.lengths.max(), choices.lengths.max()))
        self.nothing = self.score(self.longest + 1, self.longest, 0)
        self.best = np.full((len(queries.tokens), 2), self.nothing)
        self.reach = self.distance_of(self.best[:, 1])

    def score(self, distance: Any, common: Any, choice: Any) -> Any:
        """Return the scores of pairs with these distances, common prefixes and choices."""
        return (distance * (self.longest + 1) + self.longest - common) * len(self.choices.tokens) + choice

    def distance_of(self, score: np.ndarray) -> np.ndarray:
        """Return the distance in a score; that of nothing exceeds every distance."""
        return score // ((self.longest + 1) * len(self.choices.tokens))

    def compare_neighbours(self) -> None:
        """Compare each query with the choices around it in the order of its first bytes and of its last, reversed."""
        around = np.arange(-_NEIGHBOURS, _NEIGHBOURS)
        rows = max(1, _PAIRS // len(around))
        for step in (1, -1):
            spelled = _first_bytes(self.choices.tokens, step)
            order = np.argsort(spelled, kind="stable")
            places = np.searchsorted(spelled[order], _first_bytes(self.queries.tokens, step))
            for start in range(0, len(places), rows):
                near = np.clip(places[start : start + rows, None] + around, 0, len(order) - 1)
                self.compare(np.repeat(np.arange(start, start + len(near)), len(around)), order[near.ravel()])

    def compare_within(self) -> None:
        """Compare all pairs whose bag distance lets them be among the two best."""
        held: list[tuple[np.ndarray, ...]] = []
        size = 0
        for hits in _within(self.queries, self.choices, self.reach.copy()):
            held.append(hits)
            size += len(hits[0])
            if size > _PAIRS:
                self.compare_by_bound(*map(np.concatenate, zip(*held, strict=True)))
                held, size = [], 0
        if held:
            self.compare_by_bound(*map(np.concatenate, zip(*held, strict=True)))

    def compare_by_bound(self, query: np.ndarray, choice: np.ndarray, bound: np.ndarray) -> None:
        """Compare pairs whose distance is at least `bound`, those of lower bounds first."""
        for level in range(int(bound.max(initial=0)) + 1):
            at = np.flatnonzero(bound == level)
            q, c, reach = query[at], choice[at], self.reach[query[at]]
            useful = level < reach
            tied = np.flatnonzero(level == reach)  # at that very distance, of use with a better prefix or rank
            least = self.score(level, self.common_prefixes(q[tied], c[tied]), c[tied])
            useful[tied] = least < self.best[q[tied], 1]
            self.compare(q[useful], c[useful])

    def compare(self, query: np.ndarray, choice: np.ndarray) -> None:
        """Compare pairs and keep the two best of each query."""
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cpdist

        pairs = self.queries.tokens[query].tolist(), self.choices.tokens[choice].tolist()
        distance = cpdist(*pairs, scorer=Levenshtein.distance, dtype=np.int32, workers=1).astype(np.int64)
        near = np.flatnonzero(distance <= self.reach[query])
        query, choice, distance = query[near], choice[near], distance[near]
        if not len(query):
            return
        rows = np.unique(query)
        query = np.concatenate((np.repeat(rows, 2), query))
        score = self.score(distance, self.common_prefixes(query[2 * len(rows) :], choice), choice)
        score = np.concatenate((self.best[rows].ravel(), score))
        order = np.lexsort((score, query))
        query, score = query[order], score[order]
        fresh = np.ones(len(query), bool)  # a pair may have been compared before
        fresh[1:] = (query[1:] != query[:-1]) | (score[1:] != score[:-1]) | (score[1:] == self.nothing)
        query, score = query[fresh], score[fresh]
        first = np.searchsorted(query, rows)
        self.best[rows] = np.stack((score[first], score[first + 1]), axis=1)
        self.reach[rows] = self.distance_of(self.best[rows, 1])

    def common_prefixes(self, query: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """Return how many bytes the two strings of each pair begin with in common."""
        limit = np.minimum(self.queries.lengths[query], self.choices.lengths[choice])
        common = np.zeros(len(query), np.int64)
        alive = np.flatnonzero(limit)
        while len(alive):
            place = common[alive]
            a = self.queries.flat[self.queries.starts[query[alive]] + place]
            alive = alive[a == self.choices.flat[self.choices.starts[choice[alive]] + place]]
            common[alive] += 1
            alive = alive[common[alive] < limit[alive]]
        return common


def _within(queries: _Strings, choices: _Strings, reach: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (queries, choices, bag distances) [P] of all pairs whose bag distance is at most `reach` [queries]."""
    by_length = np.argsort(choices.lengths, kind="stable")
    lengths = choices.lengths[by_length]
    features = _features(b"".join(choices.tokens[by_length].tolist()), lengths)
    dtype = np.min_scalar_type(max(lengths[-1], queries.lengths.max()))
    # In the order of their bytes, the queries of a group share the sums of their common prefixes.
    keys = [(len(token), most, token) for token, most in zip(queries.tokens, reach.tolist(), strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for (length, most), group in groupby(order, key=lambda i: keys[i][:2]):
        members = list(group)
        low, high = np.searchsorted(lengths, (length - most, length + most + 1))
        window = _Window(features, int(low), np.maximum(lengths[low:high], length).astype(dtype))
        rows = max(1, _CELLS // max(1, high - low))
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            bag = np.empty((len(part), high - low), dtype)
            for member, row in zip(part, bag, strict=True):
                window.bag_distances(queries.tokens[member], row)
            hits = np.flatnonzero(bag <= most)
            row, place = np.divmod(hits, high - low)
            yield np.array(part)[row], by_length[low + place], bag.ravel()[hits]


def _features(flat: bytes, lengths: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Return (byte, k) -> positions, ascending, of the strings that have the byte more than k times.

    `flat` are the strings joined. Two strings share as many bytes as features.
    """
    keys = np.repeat(np.arange(len(lengths)) * 256, lengths) + np.frombuffer(flat, np.uint8)
    keys.sort()
    places = np.arange(len(keys))
    again = np.concatenate(([False], keys[1:] == keys[:-1]))
    names = (places - np.maximum.accumulate(np.where(again, 0, places))) * 256 + keys % 256
    order = np.argsort(names, kind="stable")
    names, starts = np.unique(names[order], return_index=True)
    parts = np.split((keys // 256)[order], starts)[1:]
    return {(name % 256, name // 256): part for name, part in zip(names.tolist(), parts, strict=True)}


class _Window:
    """Bag distances between queries of one length and consecutive choices.

    features: see `_features`; low: the first choice; longer [choices]: the larger of its length and the queries'.
    """

    def __init__(self, features: dict[tuple[int, int], np.ndarray], low: int, longer: np.ndarray) -> None:
        self.features, self.low = features, low
        self.vectors: dict[tuple[int, int], np.ndarray] = {}
        self.rest = [longer]  # rest[i]: `longer` less what is shared with the first i bytes of the previous query
        self.previous = b""

    def bag_distances(self, query: bytes, out: np.ndarray) -> None:
        """Write the distance of each choice into `out`."""
        rest, last = self.rest, len(query) - 1
        if not query:
            out[:] = rest[0]
        rest += [np.empty_like(out) for _ in range(len(query) - len(rest))]
        for place in range(max(0, min(_common_prefix(self.previous, query), last)), len(query)):
            key = query[place], query.count(query[place], 0, place)
            vector = self.vectors[key] if key in self.vectors else self._vector(key)
            target = out if place == last else rest[place + 1]
            if vector.size == out.size:
                np.subtract(rest[place], vector, out=target)
            else:
                target[:] = rest[place]
                target[vector] -= 1
        self.previous = query

    def _vector(self, key: tuple[int, int]) -> np.ndarray:
        """Return a feature as a vector over the choices, or as their positions if they are few."""
        longer = self.rest[0]
        positions = self.features.get(key, np.zeros(0, np.int64))
        first, end = np.searchsorted(positions, (self.low, self.low + longer.size))
        vector = positions[first:end] - self.low
        if vector.size * 64 >= longer.size:
            vector = np.bincount(vector, minlength=longer.size).astype(longer.dtype)
        self.vectors[key] = vector
        return vector


def _common_prefix(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
