"""Spelling bytes in the tokens of a vocabulary: its own encoding where that is exact, else the fewest tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as plain values: what it takes to spell bytes in its tokens, and to match its specials.

    `token_bytes[id]` is None for a special and for an id without a token. `roles` maps a role (eos, header, ...)
    to the special id that has it, `special_texts` every special id to its written form. `duplicate_ids` are tokens
    whose bytes another token has too and that the tokenizer prefers less (the `<0x41>` of byte fallback). Of a source,
    `encode` turns texts into ids that spell them, without specials or a dummy space.
    """

    token_bytes: list[bytes | None]
    roles: dict[str, int] = field(default_factory=dict)
    special_texts: dict[int, str] = field(default_factory=dict)
    duplicate_ids: frozenset[int] = frozenset()
    encode: Callable[[list[str]], Sequence[Sequence[int]]] | None = None


def decompose(contents: list[bytes], source: Vocabulary) -> list[list[int]]:
    """Return the source ids that spell each of `contents`, empty where the source lacks a needed byte.

    The source's own encoding where it gives exactly these bytes, else the fewest source tokens that do.
    """
    assert source.encode is not None, "the source vocabulary of a decomposition needs `encode`"
    texts: dict[int, str] = {}
    for index, content in enumerate(contents):
        try:
            texts[index] = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
    encoded = dict(zip(texts, source.encode(list(texts.values())), strict=True)) if texts else {}
    pieces = _pieces(source)
    longest = max(map(len, pieces), default=0)
    result = []
    for index, content in enumerate(contents):
        ids = encoded.get(index)
        spelled = ids is not None and content == b"".join(source.token_bytes[i] or b"\xff" for i in ids)
        result.append(list(ids) if spelled else fewest_pieces(content, pieces, longest))
    return result


def fewest_pieces(content: bytes, pieces: dict[bytes, int], longest: int) -> list[int]:
    """Return the fewest ids of `pieces` that concatenate to `content`, the longest first among equals.

    Empty when there is no way. `longest` is the length in bytes of the longest piece.
    """
    size = len(content)
    unreachable = size + 1
    cost = [unreachable] * size + [0]
    cut = [size] * size
    for start in range(size - 1, -1, -1):
        for end in range(min(size, start + longest), start, -1):
            if cost[end] + 1 < cost[start] and content[start:end] in pieces:
                cost[start], cut[start] = cost[end] + 1, end
    if cost[0] == unreachable:
        return []
    ids, start = [], 0
    while start < size:
        ids.append(pieces[content[start : cut[start]]])
        start = cut[start]
    return ids


def ids_by_bytes(source: Vocabulary, rows: int) -> dict[bytes, tuple[int, int]]:
    """Map bytes to (id for a preferred token, id for a duplicate); the same id where the source has just one."""
    found: dict[bytes, list[int | None]] = {}
    for index, content in enumerate(source.token_bytes[:rows]):
        if content:
            slot = index in source.duplicate_ids
            pair = found.setdefault(content, [None, None])
            pair[slot] = index if pair[slot] is None else pair[slot]
    return {
        content: (first if first is not None else second, second if second is not None else first)
        for content, (first, second) in found.items()
    }


def _pieces(source: Vocabulary) -> dict[bytes, int]:
    return {content: ids[0] for content, ids in ids_by_bytes(source, len(source.token_bytes)).items()}
