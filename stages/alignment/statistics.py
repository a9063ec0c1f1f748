"""What two tokenizers make of the same text: counts, fertility, vocabulary overlap, chunk shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.alignment.chunks import align
from stages.tokenization.encoding import SLOTS_PER_MESSAGE, EncodedBatch
from stages.tokenization.view import ByteView

SIDES = ("teacher", "student")
SHAPES = ("1-1", "1-n", "n-1", "n-m")  # teacher tokens - student tokens
REPORTED_KINDS = ("unconstrained", "space", "greedy")
LONGEST = 64  # chunk lengths from here on share the last bin of the histogram


class PairStatistics:
    """Statistics over examples, added batch by batch. Only text tokens count, never those of templates.

    In the summary, `lengths` of a chunk kind is a histogram: how many chunks have 0, 1, ..., LONGEST (or more) bytes.
    """

    def __init__(self, teacher: ByteView, student: ByteView) -> None:
        self.views = dict(zip(SIDES, (teacher, student), strict=True))
        self.counts = {side: np.zeros(view.vocab_size, np.int64) for side, view in self.views.items()}
        self.failures = dict.fromkeys(SIDES, 0)
        self.examples = self.bytes = self.words = 0
        self.shapes = {kind: np.zeros(len(SHAPES), np.int64) for kind in REPORTED_KINDS}
        self.lengths = {kind: np.zeros(LONGEST + 1, np.int64) for kind in REPORTED_KINDS}

    def add(self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Add examples, each a list of slots as `ByteView.encode_examples` takes them."""
        texts = [slot["text"] for slots in slots_per_example for slot in slots]
        self.examples += len(slots_per_example)
        self.bytes += sum(len(text.encode()) for text in texts)
        self.words += sum(len(text.split()) for text in texts)
        batches = {side: view.encode_examples(slots_per_example) for side, view in self.views.items()}
        for side, batch in batches.items():
            self.counts[side] += np.bincount(batch.ids[_is_text(batch)], minlength=len(self.counts[side]))
            self.failures[side] += int((~batch.exact).sum())
        for kind in REPORTED_KINDS:
            self._add_chunks(kind, batches["teacher"], batches["student"])

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
        """Return all figures as JSON values; shares are of 1, lengths in bytes."""
        used = {side: int(counts.sum()) for side, counts in self.counts.items()}
        return {
            "examples": self.examples,
            "bytes": self.bytes,
            "words": self.words,
            "sides": {side: self._side(side, used[side]) for side in SIDES},
            "overlap": self._overlap(used),
            "chunks": {kind: self._chunks(kind) for kind in REPORTED_KINDS},
        }

    def _side(self, side: str, tokens: int) -> dict[str, Any]:
        view = self.views[side]
        return {
            "name": view.name,
            "vocab_size": view.vocab_size,
            "tokens": tokens,
            "distinct_tokens": int((self.counts[side] > 0).sum()),
            "bytes_per_token": _ratio(self.bytes, tokens),
            "tokens_per_word": _ratio(tokens, self.words),
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
    return np.bincount(_global_chunks(batch, chunks, n_chunks)[0], minlength=int(n_chunks.sum()))


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
