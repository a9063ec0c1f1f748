"""What two tokenizers make of the same text: counts, fertility, vocabulary overlap, coverage, chunk shapes.

Ordered by name only: the statistics of a pair the other way round are their mirror image, but for the advice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from stages.alignment.chunks import align
from stages.alignment.coverage import SIDES, advice, audit
from stages.alignment.fertility import ALL, Fertility
from stages.tokenization.encoding import SCALE, SLOTS_PER_MESSAGE, EncodedBatch
from stages.tokenization.view import ByteView

SHAPES = ("1-1", "1-n", "n-1", "n-m")  # teacher tokens - student tokens
REPORTED_KINDS = ("unconstrained", "space", "greedy")
LONGEST = 64  # chunk lengths from here on share the last bin of the histogram
Item, Result = TypeVar("Item"), TypeVar("Result")


class PairStatistics:
    """Statistics over examples, added batch by batch in corpus order. Only text tokens count, never those of templates.

    In the summary, `lengths` of a chunk kind is a histogram: how many chunks have 0, 1, ..., LONGEST (or more) bytes.
    """

    def __init__(self, teacher: ByteView, student: ByteView) -> None:
        self.views = dict(zip(SIDES, (teacher, student), strict=True))
        self.counts = {side: np.zeros(view.vocab_size, np.int64) for side, view in self.views.items()}
        self.failures = dict.fromkeys(SIDES, 0)
        self.examples = 0
        self.fertility = Fertility()
        self.shapes = {kind: np.zeros(len(SHAPES), np.int64) for kind in REPORTED_KINDS}
        self.lengths = {kind: np.zeros(LONGEST + 1, np.int64) for kind in REPORTED_KINDS}

    def encode(self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]]) -> list[EncodedBatch]:
        """Return the tokens of each side for examples, each a list of slots as `ByteView.encode_examples` takes."""
        return [view.encode_examples(slots_per_example) for view in self.views.values()]

    def add(
        self,
        slots_per_example: Sequence[Sequence[Mapping[str, Any]]],
        encoded: Sequence[EncodedBatch],
        starts_document: Sequence[bool],
    ) -> None:
        """Add examples with what `encode` made of them; `starts_document` as in the EXAMPLES schema."""
        self.count(encoded)
        self.fertility.add(slots_per_example, encoded, starts_document)
        for kind in REPORTED_KINDS:
            self._add_chunks(kind, *encoded)

    def count(self, encoded: Sequence[EncodedBatch]) -> None:
        """Add the number of times that each token is used; part of `add`."""
        self.examples += len(encoded[0].exact)
        for side, batch in zip(SIDES, encoded, strict=True):
            self.counts[side] += np.bincount(batch.ids[_is_text(batch)], minlength=len(self.counts[side]))
            self.failures[side] += int((~batch.exact).sum())

    def _add_chunks(self, kind: str, teacher: EncodedBatch, student: EncodedBatch) -> None:
        chunk_teacher, chunk_student, n_chunks = align(teacher, student, kind, scored=False)
        total = int(n_chunks.sum())
        tokens = [_per_chunk(b, c, n_chunks) for b, c in ((teacher, chunk_teacher), (student, chunk_student))]
        in_text = tokens[0] > 0
        several = [t[in_text] > 1 for t in tokens]
        self.shapes[kind] += np.bincount(2 * several[0] + several[1], minlength=4)
        sizes = []
        for side, batch, chunks in (("teacher", teacher, chunk_teacher), ("student", student, chunk_student)):
            index, counted = _global_chunks(batch, chunks, n_chunks)
            sizes.append(np.bincount(index, self.views[side].lengths[batch.ids[counted]], total).astype(np.int64))
        # The lesser: a dummy space of SentencePiece is no byte of the text.
        lengths = np.minimum(*sizes)
        self.lengths[kind] += np.bincount(np.minimum(lengths[in_text], LONGEST), minlength=LONGEST + 1)

    def summary(self) -> dict[str, Any]:
        """Return all figures as JSON values; shares are of 1, lengths in bytes, intervals at 95 %.

        `fertility` and `coverage` are rows of the schemas of their names.
        """
        used = {side: int(counts.sum()) for side, counts in self.counts.items()}
        fertility = self.fertility.rows()
        overall = {row["side"]: row for row in fertility if row["class"] == ALL}
        chunks = {kind: self._chunks(kind) for kind in REPORTED_KINDS}
        coverage = audit({side: view.token_bytes for side, view in self.views.items()}, self.counts)
        return {
            "examples": self.examples,
            "documents": overall["teacher"]["documents"] if overall else 0,
            "bytes": self.bytes,
            "words": round(self.fertility.sums[-1, 1]),
            "sides": {side: self._side(side, used[side], overall.get(side)) for side in SIDES},
            "overlap": self._overlap(used),
            "chunks": chunks,
            "fertility": fertility,
            "coverage": coverage,
            "advice": advice(coverage, chunks["unconstrained"]["shares"]["1-1"] or 0.0),
        }

    @property
    def bytes(self) -> int:
        """Bytes of the text."""
        return round(self.fertility.sums[-1, 0])

    def _side(self, side: str, tokens: int, overall: Mapping[str, Any] | None) -> dict[str, Any]:
        view = self.views[side]
        ratios = {}
        for name in ("bytes_per_token", "tokens_per_word"):
            value, low, high = (overall[f"{name}{end}"] if overall else None for end in ("", "_low", "_high"))
            ratios |= {
                name: _rounded(value),
                f"{name}_interval": None if low is None else [_rounded(low), _rounded(high)],
            }
        return {
            "name": view.name,
            "vocab_size": view.vocab_size,
            "tokens": tokens,
            "distinct_tokens": int((self.counts[side] > 0).sum()),
            **ratios,
            "round_trip_failures": self.failures[side],
        }

    def _overlap(self, used: dict[str, int]) -> dict[str, Any]:
        """Return how much of the vocabularies, as sets of byte strings, and of the text is common to both."""
        strings = {side: {token for token in view.token_bytes if token} for side, view in self.views.items()}
        common = strings["teacher"] & strings["student"]
        result: dict[str, Any] = {"tokens": len(common)}
        for side, view in self.views.items():
            shared = np.fromiter((token in common for token in view.token_bytes), bool, view.vocab_size)
            result[f"share_of_{side}_vocabulary"] = _ratio(len(common), len(strings[side]))
            result[f"share_of_{side}_use"] = _ratio(int(self.counts[side][shared].sum()), used[side])
        return result

    def _chunks(self, kind: str) -> dict[str, Any]:
        lengths, total = self.lengths[kind], int(self.shapes[kind].sum())
        return {
            "chunks": total,
            "shares": {shape: _ratio(int(n), total) for shape, n in zip(SHAPES, self.shapes[kind], strict=True)},
            "bytes_per_chunk": _ratio(self.bytes, total),
            "lengths": lengths.tolist(),
        }


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)), one item ahead in a thread: tokenizers work while numpy counts."""
    with ThreadPoolExecutor(1) as pool:
        pending: list[tuple[Item, Future[Result]]] = []
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > 1:
                earlier, result = pending.pop(0)
                yield earlier, result.result()
        for earlier, result in pending:
            yield earlier, result.result()


def drawn_alignment(teacher: ByteView, student: ByteView, slots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one example's tokens, readable, and chunk ids (unconstrained) of both sides, for drawing."""
    batches = [view.encode_examples([slots]) for view in (teacher, student)]
    chunks = align(*batches, scored=False)
    return {
        side: {"tokens": [view.string_of(i) for i in batch.ids], "chunks": ids.tolist(), "slots": batch.slot.tolist()}
        for side, view, batch, ids in zip(SIDES, (teacher, student), batches, chunks[:2], strict=True)
    }


def _is_text(batch: EncodedBatch) -> np.ndarray:
    return batch.slot % SLOTS_PER_MESSAGE == 2


def _global_chunks(batch: EncodedBatch, chunks: np.ndarray, n_chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (chunk of each counted text token within the whole batch, bool [N] which tokens are counted)."""
    bases = np.repeat(np.cumsum(n_chunks) - n_chunks, np.diff(batch.offsets))
    counted = _is_text(batch) & (chunks >= 0)
    return (bases + chunks)[counted], counted


def _per_chunk(batch: EncodedBatch, chunks: np.ndarray, n_chunks: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each chunk that cover a byte of it: a dummy space on its own is none."""
    index, counted = _global_chunks(batch, chunks, n_chunks)
    return np.bincount(index[batch.ends[counted] % SCALE == 0], minlength=int(n_chunks.sum()))


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
