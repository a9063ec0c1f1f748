"""Which token may follow which: byte pair encoding decided without encoding, from its merges alone.

BPE always carries out the merge of lowest rank, the leftmost of equals. What happens inside a stretch that ends up as
one token is therefore what happens to that stretch alone, and a sequence of tokens is the encoding of its string if and
only if every two neighbours are the encoding of theirs.

Of two neighbours, the head shows its right edge to the boundary: itself, its right part, the right part of that, and so
on; the follower shows its left edge. Each symbol of an edge lives from its birth, the rank of the merge that made it,
to its death, the birth of the symbol it becomes a part of. With u on the one edge and v on the other, the merge (u, v)
of rank m crosses the boundary, so that the two are no encoding, exactly if t = max(m, birth u, birth v) satisfies

    t < death u    and    t <= death v.

The tokens with v on their left edge are the descendants of v in the tree of left parts. With siblings in order of
falling birth, those in which v dies late enough are an interval of the depth-first order: one for each merge.
"""

from typing import Any, NamedTuple

import numpy as np

_NEVER = 1 << 40  # later than any birth
_UNMERGED = -1  # birth of a symbol that no merge makes


class Derivations(NamedTuple):
    """How each token is made: `left`, `right` int64 [ids], -1 for none; `birth` int64 [ids]; `reachable` bool [ids]."""

    left: np.ndarray
    right: np.ndarray
    birth: np.ndarray
    reachable: np.ndarray


class Adjacency:
    """The pairs of tokens that are the encoding of their joined bytes, for one BPE model; see the module.

    `merges` holds (left id, right id, resulting id) by rank; `symbols` are the ids that text starts from; `first` uint8
    [ids] is the first byte of each token.
    """

    def __init__(self, merges: list[tuple[int, int, int]], symbols: list[int], first: np.ndarray) -> None:
        self.derivations = derive(merges, symbols, len(first))
        self._order(first)
        self._exclude(merges)

    def _order(self, first: np.ndarray) -> None:
        """Number the reachable tokens depth first: tokens with one first byte are one block."""
        left, _, birth, reachable = self.derivations
        ids = np.flatnonzero(reachable)
        by_birth = ids[np.argsort(birth[ids], kind="stable")].tolist()
        sizes, parents = [1] * len(first), left.tolist()
        for token in reversed(by_birth):
            if parents[token] >= 0:
                sizes[parents[token]] += sizes[token]
        position, free = [-1] * len(first), [0] * len(first)
        roots = sorted((token for token in by_birth if parents[token] < 0), key=lambda token: (first[token], token))
        at = 0
        for token in roots:
            position[token], at = at, at + sizes[token]
            free[token] = at
        for token in by_birth:
            parent = parents[token]
            if parent >= 0:
                free[parent] -= sizes[token]
                position[token] = free[parent]
                free[token] = position[token] + sizes[token]
        self.position, self._sizes = np.array(position), np.array(sizes)
        self.blocks = np.concatenate(([0], np.cumsum(np.bincount(first[ids], minlength=256))))

    def _exclude(self, merges: list[tuple[int, int, int]]) -> None:
        """Compute the interval that each merge excludes, sorted by the merge's left token and the interval's start."""
        left, _, birth, reachable = self.derivations
        table = np.array(merges, np.int64).reshape(-1, 3)
        rank = np.flatnonzero(reachable[table[:, 0]] & reachable[table[:, 1]])
        u, v = table[rank, 0], table[rank, 1]
        time = np.maximum(rank, np.maximum(birth[u], birth[v]))
        children = np.flatnonzero(reachable & (left >= 0))
        children = children[np.lexsort((birth[children], left[children]))]
        scale = len(merges) + 1
        after = np.searchsorted(left[children] * scale + birth[children], v * scale + time)
        ends = self.position[v] + 1
        if len(children):
            child = children[np.minimum(after, len(children) - 1)]
            dies_late = (after < len(children)) & (left[child] == v)
            ends = np.where(dies_late, self.position[child] + self._sizes[child], ends)
        order = np.lexsort((self.position[v], u))
        self._starts, self._ends, self._times = self.position[v][order], ends[order], time[order]
        self._stride = len(self.position) + 1
        self._keys = u[order] * self._stride + self._starts

    def followers(self, heads: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (bases int64 [n], may follow bool [sum of blocks]) for n pairs of a head and a first byte.

        A token with the first byte of pair i may follow its head if the flag at bases[i] + position[token] is set. Head
        -1 is the start of the text, which every token may follow.
        """
        block, size = self.blocks[first], np.diff(self.blocks)[first]
        places = np.cumsum(size) - size
        bases = places - block
        change = np.zeros(int(size.sum()) + 1, np.int32)
        pair = np.flatnonzero(heads >= 0)
        token, death = heads[pair].astype(np.int64), np.full(len(pair), _NEVER)
        while len(pair):
            low = np.searchsorted(self._keys, token * self._stride + block[pair])
            high = np.searchsorted(self._keys, token * self._stride + block[pair] + size[pair])
            merge, of = ranges(low, high - low)
            crosses = self._times[merge] < death[of]
            merge, of = merge[crosses], of[crosses]
            np.add.at(change, bases[pair[of]] + self._starts[merge], 1)
            np.add.at(change, bases[pair[of]] + self._ends[merge], -1)
            death = self.derivations.birth[token]
            token = self.derivations.right[token]
            more = token >= 0
            pair, token, death = pair[more], token[more], death[more]
        return bases, np.cumsum(change[:-1], dtype=np.int32) == 0


def derive(merges: list[tuple[int, int, int]], symbols: list[int], size: int) -> Derivations:
    """Find how BPE makes each token from its own string, if it does; `size` is the number of ids.

    A token that several merges make is made by the one whose parts do not merge otherwise first.
    """
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
    lefts, rights, births = [-1] * size, [-1] * size, [_NEVER] * size
    for symbol in symbols:
        births[symbol] = _UNMERGED

    def edge(token: int, parts: list[int]) -> list[tuple[int, int]]:
        found, death = [], _NEVER
        while token >= 0:
            found.append((token, death))
            token, death = parts[token], births[token]
        return found

    def stay_apart(left: int, right: int) -> bool:
        for u, death_u in edge(left, rights):
            for v, death_v in edge(right, lefts):
                rank = ranks.get((u, v))
                if rank is not None and (u, v) != (left, right):
                    time = max(rank, births[u], births[v])
                    if time < death_u and time <= death_v:
                        return False
        return True

    for rank, (left, right, made) in enumerate(merges):
        known = births[left] < rank and births[right] < rank and births[made] == _NEVER
        if known and ranks[left, right] == rank and stay_apart(left, right):
            lefts[made], rights[made], births[made] = left, right, rank
    birth = np.array(births)
    return Derivations(np.array(lefts), np.array(rights), birth, birth < _NEVER)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the numbers of all ranges start:start + length, one after another; the range that each is of)."""
    of = np.repeat(np.arange(len(starts)), lengths)
    return np.arange(len(of)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths), of


def merges_of(model: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Return (left id, right id, resulting id) of the merges of a BPE model in a tokenizer.json, by rank."""
    vocabulary, found = model["vocab"], []
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        found.append((vocabulary[left], vocabulary[right], vocabulary[left + right]))
    return found
