"""Cover dictionaries: how the encoding of a string that goes on can cover the string's end.

The cover dictionary D(x) of a byte string x maps bytes k to a token b: what the tokenizer makes of x + k, as one
pretoken, ends in b, and b begins inside x. (An encoding is unique, so a key has one token.) Only whole characters can
be encoded: splits of x whose head is none have no entry, nor have tokens that are none. tokenkit: `compute_cover_dict`.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.alignment.adjacency import Adjacency, merges_of, ranges
from stages.tokenization.byte_functions import byte_alphabet, is_fallback
from stages.tokenization.view import ByteView

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CANDIDATES = 1 << 21  # tokens looked at together
_STRINGS = 1 << 16  # strings encoded together
_BYTE_LEVEL = dict(enumerate(byte_alphabet()))


@dataclass(frozen=True)
class Covers:
    """Cover dictionaries of n strings. Strings that end alike share groups of entries, so there are two levels.

    String i has the groups `groups[string_offsets[i]:string_offsets[i + 1]]`; group g has the entries
    group_offsets[g]:group_offsets[g + 1]. token int32 [entries] is b; inside int32 [groups] is how many bytes of b lie
    inside the string, so that the key is what b has after them.
    """

    string_offsets: np.ndarray
    groups: np.ndarray
    group_offsets: np.ndarray
    token: np.ndarray
    inside: np.ndarray

    def sizes(self) -> np.ndarray:
        """Return int64 [n]: entries of each string."""
        cumulated = np.concatenate(([0], np.cumsum(np.diff(self.group_offsets)[self.groups])))
        return np.diff(cumulated[self.string_offsets])

    def entries(self, strings: np.ndarray) -> np.ndarray:
        """Return the places of the entries of `strings`, one string after another."""
        at, _ = ranges(self.string_offsets[strings], self.string_offsets[strings + 1] - self.string_offsets[strings])
        groups = self.groups[at]
        return ranges(self.group_offsets[groups], self.group_offsets[groups + 1] - self.group_offsets[groups])[0]


class CoverFinder:
    """Finds cover dictionaries for one tokenizer.

    A BPE model whose merges explain its vocabulary (`adjacency` is not None) is not asked about single candidates; any
    other model encodes every string in question.
    """

    def __init__(self, view: ByteView) -> None:
        model = json.loads((view.folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        self._view = view
        self._bare = _bare_tokenizer(model)
        vocabulary = self._bare.get_vocab(with_added_tokens=False)
        content = view.token_bytes
        # An entry's token has a byte inside and one in the key.
        ids = sorted((i for i in vocabulary.values() if len(content[i] or b"") > 1), key=lambda i: (content[i], i))
        self.adjacency = self._explained(model, vocabulary, ids)
        if self.adjacency:
            ids = [i for i in ids if self.adjacency.derivations.reachable[i]]
        ids = [i for i in ids if _whole_characters(content[i]) == len(content[i])]
        self._tokens = np.array(ids, np.int64)
        self._spelled = [content[i] for i in ids]  # sorted, so that what begins alike stands together

    def find(self, strings: Sequence[bytes]) -> Covers:
        """Return the cover dictionaries of `strings`."""
        splits = _Splits(strings, self._spelled)
        heads = self._encode(splits.heads)
        if self.adjacency:
            last = np.array([ids[-1] if len(ids) else -1 for ids in heads], np.int64)
            pair = (last[splits.head] + 1) * 256 + splits.first[splits.rest]
            shared, groups = np.unique(pair * len(splits.begins) + splits.rest, return_inverse=True)
            pair, rest = np.divmod(shared, len(splits.begins))
            parts = list(self._allowed(splits, pair, rest))
        else:
            groups, rest = np.arange(len(splits.rest)), splits.rest
            parts = list(self._confirmed(splits, heads))
        counts, token = (np.concatenate([part[k] for part in parts] or [np.zeros(0, np.int32)]) for k in (0, 1))
        group_offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        return Covers(splits.offsets, groups, group_offsets, token, splits.lengths[rest])

    def _allowed(
        self, splits: "_Splits", pair: np.ndarray, rest: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (entries of each group, their tokens): those that may follow the last token of the group's head.

        `pair`, sorted: (that token + 1) * 256 + first byte of the rest; groups of one pair share the flags.
        """
        assert self.adjacency is not None
        position = self.adjacency.position[self._tokens]
        sizes = (splits.ends - splits.begins)[rest]
        flags = np.where(np.diff(pair, prepend=-1), np.diff(self.adjacency.blocks)[pair % 256], 0)
        for begin, end in _batches(sizes + flags):
            pairs, of_pair = np.unique(pair[begin:end], return_inverse=True)
            bases, may_follow = self.adjacency.followers(pairs // 256 - 1, pairs % 256)
            place, of = ranges(splits.begins[rest[begin:end]], sizes[begin:end])
            good = may_follow[bases[of_pair[of]] + position[place]]
            yield np.bincount(of[good], minlength=end - begin), self._tokens[place[good]].astype(np.int32)

    def _confirmed(self, splits: "_Splits", heads: list[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (entries of each split, their tokens): those that the model itself makes of head and token joined."""
        sizes = (splits.ends - splits.begins)[splits.rest]
        for begin, end in _batches(sizes, _STRINGS):
            place, of = ranges(splits.begins[splits.rest[begin:end]], sizes[begin:end])
            token, head = self._tokens[place], splits.head[of + begin].tolist()
            joined = [splits.heads[h] + self._spelled[p] for h, p in zip(head, place.tolist(), strict=True)]
            wanted = [[*heads[h], b] for h, b in zip(head, token.tolist(), strict=True)]
            good = np.array([a == b for a, b in zip(self._encode(joined), wanted, strict=True)], bool)
            yield np.bincount(of[good], minlength=end - begin), token[good].astype(np.int32)

    def _encode(self, strings: Sequence[bytes]) -> list[Sequence[int]]:
        """Return what the model makes of each string as one pretoken."""
        texts = [self._spelling(string) for string in strings]
        return [item.ids for item in self._bare.encode_batch_fast(texts, add_special_tokens=False)]

    def _spelling(self, string: bytes) -> str:
        """Write bytes as the model's vocabulary has them."""
        if self._view.settings["byte_function"] == "byte_level":
            return string.decode("latin-1").translate(_BYTE_LEVEL)
        return string.decode().replace(" ", self._view.settings["mark"])

    def _explained(self, model: dict[str, Any], vocabulary: dict[str, int], ids: list[int]) -> Adjacency | None:
        """Return the adjacency of a BPE model if its merges reach those of `ids` that the model itself reaches."""
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        symbols = [i for token, i in vocabulary.items() if len(token) == 1 or is_fallback(token)]
        adjacency = Adjacency(merges_of(model), symbols, self._view.first_bytes)
        encoded = self._encode([self._view.token_bytes[i] for i in ids])
        reached = [list(found) == [i] for found, i in zip(encoded, ids, strict=True)]
        return adjacency if np.array_equal(adjacency.derivations.reachable[ids], reached) else None


class _Splits:
    """All cuts of strings into a head of whole characters and a rest that begins some longer token.

    Parallel over splits: head, rest; string i has the splits offsets[i]:offsets[i + 1]. Parallel over the distinct
    rests: begins, ends (which of the sorted tokens go on from it), lengths in bytes, first byte. `heads`: distinct.
    """

    def __init__(self, strings: Sequence[bytes], spelled: Sequence[bytes]) -> None:
        heads: dict[bytes, int] = {}
        rests: dict[bytes, int] = {}
        begins, ends, head_of, rest_of, offsets = [], [], [], [], [0]
        for string in strings:
            for cut in _cuts(string):
                rest = string[cut:]
                number = rests.get(rest)
                if number is None:
                    number = rests[rest] = len(rests)
                    begins.append(bisect_right(spelled, rest))
                    ends.append(bisect_left(spelled, rest + b"\xff"))  # no character has this byte
                if ends[number] > begins[number]:
                    head_of.append(heads.setdefault(string[:cut], len(heads)))
                    rest_of.append(number)
            offsets.append(len(head_of))
        self.heads = list(heads)
        self.head, self.rest, self.offsets = (np.array(values, np.int64) for values in (head_of, rest_of, offsets))
        self.begins, self.ends = np.array(begins, np.int64), np.array(ends, np.int64)
        self.lengths = np.array([len(rest) for rest in rests], np.int32)
        self.first = np.array([rest[0] for rest in rests], np.int64)


def _whole_characters(string: bytes) -> int:
    """Return how many bytes at the start of `string` are whole UTF-8 characters."""
    try:
        string.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(string)


def _cuts(string: bytes) -> Sequence[int]:
    """Return where `string` can be cut with whole characters on the left and something on the right."""
    if string.isascii():
        return range(len(string))
    end = _whole_characters(string)
    # Continuation bytes are 0b10xxxxxx.
    return [cut for cut in range(min(end + 1, len(string))) if cut == end or string[cut] & 0xC0 != 0x80]


def _batches(sizes: np.ndarray, limit: int = _CANDIDATES) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of runs whose sizes add up to about `limit`, at least one in each."""
    batch = np.cumsum(sizes) // limit
    bounds = np.flatnonzero(np.diff(batch, prepend=-1, append=-1))
    yield from zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)


def _bare_tokenizer(model: dict[str, Any]) -> "Tokenizer":
    """Return a tokenizer that is the model of a tokenizer.json and nothing else: no normalizer, no pretokenizer."""
    from tokenizers import Tokenizer

    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    exact = model | {"dropout": None} if "dropout" in model else model
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": exact} | parts))
