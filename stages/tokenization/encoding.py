"""Texts and chats to flat numpy arrays of tokens with byte coordinates that any two tokenizers share.

Coordinates. Every tokenizer lays an example out in the same units, from the row alone: a text slot of n bytes
has n units, each template slot has one. Slots of an example with M messages (a plain text is one message):

    0 start | 1+3m header | 2+3m text | 3+3m end of turn | 3M+1 end of document

A token's `ends` is SCALE times the unit at which it ends, counted from the example's start. Only multiples of SCALE
can match between tokenizers: tokens inside a template slot and tokens of no width get values in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from stages.tokenization.view import ByteView

SCALE = 4
START_SLOT = 0
SLOTS_PER_MESSAGE = 3


class Tokens(NamedTuple):
    """Tokens of one text: `ids` int32 [n], `ends` int32 [n] in bytes from the text's start, `exact`: no byte lost."""

    ids: np.ndarray
    ends: np.ndarray
    exact: bool


@dataclass(frozen=True)
class EncodedBatch:
    """B examples as flat arrays over all N tokens; example b owns tokens offsets[b]:offsets[b + 1].

    ids int32 [N]; offsets int64 [B+1]; ends int64 [N], see the module; slot int32 [N], the slot within the example;
    loss bool [N], token is a training target; exact bool [B], the tokens' bytes are the example's bytes;
    widths int64 [B], scaled length of each example, the same for all tokenizers; first uint8 [N], first byte of
    each token (0 for one without bytes).
    """

    ids: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    slot: np.ndarray
    loss: np.ndarray
    exact: np.ndarray
    widths: np.ndarray
    first: np.ndarray


class _Pieces:
    """Runs of tokens in order, one per slot that has tokens; lists are parallel. A text waits for the tokenizer."""

    def __init__(self) -> None:
        self.example: list[int] = []
        self.slot: list[int] = []
        self.base: list[int] = []  # first unit of the slot
        self.loss: list[bool] = []
        self.ids: list[Sequence[int]] = []
        self.text_at: list[int] = []  # positions in the lists above that are texts
        self.texts: list[str] = []
        self.sizes: list[int] = []  # UTF-8 bytes of each text
        self.prefixed: list[bool] = []  # whether the tokenizer's dummy space belongs to the text

    def add(self, example: int, slot: int, base: int, loss: bool, ids: Sequence[int]) -> None:
        if len(ids):
            self.example.append(example)
            self.slot.append(slot)
            self.base.append(base)
            self.loss.append(loss)
            self.ids.append(ids)

    def add_text(self, example: int, slot: int, base: int, loss: bool, text: str, size: int, prefixed: bool) -> None:
        if text:
            self.text_at.append(len(self.ids))
            self.texts.append(text)
            self.sizes.append(size)
            self.prefixed.append(prefixed)
            self.add(example, slot, base, loss, (0,))

    def drop_empty(self) -> list[int]:
        """Remove texts that became no token at all (a vocabulary without these characters); return their examples."""
        empty = {k for k, at in enumerate(self.text_at) if not len(self.ids[at])}
        if not empty:
            return []
        gone = {self.text_at[k] for k in empty}
        lost = [self.example[at] for at in gone]
        place = np.cumsum([i not in gone for i in range(len(self.ids))]) - 1
        for name in ("example", "slot", "base", "loss", "ids"):
            setattr(self, name, [value for i, value in enumerate(getattr(self, name)) if i not in gone])
        for name in ("texts", "sizes", "prefixed", "text_at"):
            setattr(self, name, [value for k, value in enumerate(getattr(self, name)) if k not in empty])
        self.text_at = [int(place[at]) for at in self.text_at]
        return lost


def encode_texts(view: ByteView, texts: Sequence[str]) -> list[Tokens]:
    """Encode raw texts, no special tokens added, special-looking text as plain text. See `ByteView.encode_texts`."""
    batch = encode_examples(view, [[{"role": "text", "text": text, "loss": True}] for text in texts], None, bare=True)
    ends = batch.ends + SCALE - 1
    ends = np.where(batch.ends % SCALE == 1, batch.ends - 1, ends) // SCALE
    bounds = list(zip(batch.offsets[:-1], batch.offsets[1:], strict=True))
    # Unit 0 is the start slot, unit 1 the header.
    return [
        Tokens(batch.ids[a:b], (ends[a:b] - 2).astype(np.int32), bool(exact))
        for (a, b), exact in zip(bounds, batch.exact, strict=True)
    ]


def encode_examples(
    view: ByteView,
    slots_per_example: Sequence[Sequence[Mapping[str, Any]]],
    ends_document: Sequence[bool] | None,
    bare: bool = False,
) -> EncodedBatch:
    """Encode examples given as slots {"role", "text", "loss"}; see `ByteView.encode_examples`."""
    pieces = _Pieces()
    widths = np.empty(len(slots_per_example), np.int64)
    for example, slots in enumerate(slots_per_example):
        ends = ends_document is not None and bool(ends_document[example])
        widths[example] = SCALE * _lay_out(view, pieces, example, slots, ends, bare)
    for position, ids in zip(pieces.text_at, view.text_ids(pieces.texts, pieces.prefixed), strict=True):
        pieces.ids[position] = ids
    lost = pieces.drop_empty()
    batch = _assemble(view, pieces, widths)
    batch.exact[lost] = False
    return batch


def _lay_out(
    view: ByteView, pieces: _Pieces, example: int, slots: Sequence[Mapping[str, Any]], ends: bool, bare: bool
) -> int:
    """Append an example's pieces; return its width in units."""
    plain = all(slot["role"] == "text" for slot in slots)
    template = view.plain_pieces(len(slots), bare) if plain else view.chat_pieces(tuple(slot["role"] for slot in slots))
    pieces.add(example, START_SLOT, 0, False, template.start)
    unit, number, loss = 1, 1, False
    for slot, turn in zip(slots, template.turns, strict=True):
        text, loss = slot["text"], bool(slot["loss"])
        size = len(text) if text.isascii() else len(text.encode())
        pieces.add(example, number, unit, False, turn.header)
        pieces.add_text(example, number + 1, unit + 1, loss, text, size, turn.prefixed)
        pieces.add(example, number + 2, unit + 1 + size, loss, turn.end)
        unit += size + 2
        number += SLOTS_PER_MESSAGE
    if plain and ends and not bare and view.eos_id is not None:
        pieces.add(example, number, unit, loss, (view.eos_id,))
    return unit + 1


def _assemble(view: ByteView, pieces: _Pieces, widths: np.ndarray) -> EncodedBatch:
    runs = len(pieces.ids)
    counts = np.fromiter(map(len, pieces.ids), np.int64, runs)
    starts = np.cumsum(counts) - counts
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(pieces.ids), np.int32, total)
    is_text = np.zeros(runs, bool)
    is_text[pieces.text_at] = True
    byte_ends, exact_run = _byte_ends(view, pieces, ids, starts, counts, is_text)

    ends = np.repeat(SCALE * np.asarray(pieces.base, np.int64), counts)
    inner = np.repeat(~is_text, counts)
    last = starts + counts - 1
    # A template slot is one unit that only its last token closes; a text token closes the unit of its last byte.
    ends += np.where(inner, 1, SCALE * byte_ends)
    ends[last[~is_text]] += SCALE - 1
    _mark_widthless(ends, byte_ends, starts, counts, is_text)

    example = np.asarray(pieces.example, np.int64)
    per_example = (
        np.bincount(example, counts, len(widths)).astype(np.int64) if runs else np.zeros(len(widths), np.int64)
    )
    exact = np.ones(len(widths), bool)
    exact[example[~exact_run]] = False
    return EncodedBatch(
        ids=ids,
        offsets=np.concatenate(([0], np.cumsum(per_example))),
        ends=ends,
        slot=np.repeat(np.asarray(pieces.slot, np.int32), counts),
        loss=np.repeat(np.asarray(pieces.loss, bool), counts),
        exact=exact,
        widths=widths,
        first=view.first_bytes[ids],
    )


def _byte_ends(
    view: ByteView, pieces: _Pieces, ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, is_text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (byte end of each token within its text run, 0 elsewhere; whether each run is exact)."""
    exact = np.ones(len(counts), bool)
    if not pieces.text_at:
        return np.zeros(len(ids), np.int64), exact
    lengths = view.lengths[ids].astype(np.int64)
    at = np.asarray(pieces.text_at)
    sizes = np.asarray(pieces.sizes, np.int64)
    sums = np.add.reduceat(lengths, starts)[at]
    dummy = (sums == sizes + 1) & np.asarray(pieces.prefixed) if view.prefix_space else np.zeros(len(at), bool)
    # The dummy space of SentencePiece is no byte of the text: the slot's first token gives it up.
    lengths[starts[at[dummy]]] -= 1
    good = (sums == sizes) | dummy
    expected = [
        b" " + text.encode() if trim else text.encode() for text, trim in zip(pieces.texts, dummy.tolist(), strict=True)
    ]
    if not good.all() or view.join(chain.from_iterable(pieces.ids[i] for i in pieces.text_at)) != b"".join(expected):
        good &= np.fromiter((view.join(pieces.ids[i]) == e for i, e in zip(at, expected, strict=True)), bool, len(at))
    exact[at] = good
    cumulated = np.cumsum(np.where(np.repeat(is_text, counts), lengths, 0))
    before = cumulated[starts] - np.where(is_text, lengths[starts], 0)
    ends = cumulated - np.repeat(before, counts)
    ends[~np.repeat(is_text, counts)] = 0
    for k in np.flatnonzero(~good):
        begin, run = starts[at[k]], at[k]
        ends[begin : begin + counts[run]] = view.estimated_ends(
            pieces.texts[k], counts[run], ends[begin : begin + counts[run]]
        )
    return ends, exact


def _mark_widthless(
    ends: np.ndarray, byte_ends: np.ndarray, starts: np.ndarray, counts: np.ndarray, is_text: np.ndarray
) -> None:
    """Move, in place, text tokens without width off the units that can match: they ride with the token after them."""
    text = np.repeat(is_text, counts)
    at_start = text & (byte_ends == 0)
    if at_start.any():
        ends[at_start] += 1
    follows = np.zeros(len(ends), bool)
    follows[:-1] = (byte_ends[1:] == byte_ends[:-1]) & text[:-1] & (byte_ends[:-1] > 0)
    follows[starts + counts - 1] = False
    if follows.any():
        ends[follows] -= 1
