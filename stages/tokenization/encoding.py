"""Texts and chats to flat numpy arrays of tokens with byte coordinates that any two tokenizers share.

Coordinates. Every tokenizer lays an example out in the same units, from the row alone: a text slot of n bytes
has n units, each template slot has one. Slots of an example with M messages (a plain text is one message):

    0 start | 1+3m header | 2+3m text | 3+3m end of turn | 3M+1 end of document

A token's `ends` is SCALE times the unit at which it ends, counted from the example's start. Only multiples of SCALE
can match between tokenizers: tokens inside a template slot and tokens of no width get values in between.

All text between two special tokens is tokenized as one, as the tokenizer does with what a template renders, and the
tokens are given to slots afterwards: a token belongs to the slot in which it ends, but to the last text that it has a
byte of if it has one. A text's last token ends where the text does: white space there that a template strips has no
tokens, as have its other parts that a template leaves out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from stages.tokenization.byte_tokens import ByteTokenizer
from stages.tokenization.chat import CONTENT, SLOTS_PER_MESSAGE, Chats, Layout, Section, json_text

SCALE = 4
START_SLOT = 0


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


class _Slot(NamedTuple):
    """A slot of an example: its first unit, the bytes of its text (None for a template slot), whether it is trained."""

    example: int
    number: int
    base: int
    size: int | None
    loss: bool


class _Runs:
    """Runs of tokens in order, a special token or a text each, and the segments of their slots; lists are parallel."""

    def __init__(self) -> None:
        self.example: list[int] = []
        self.ids: list[Sequence[int]] = []
        self.sizes: list[int] = []  # UTF-8 bytes of each, 0 for a special token
        self.segments: list[int] = []  # how many each has
        self.text_at: list[int] = []  # which of them are texts, still without ids
        self.texts: list[str] = []
        self.prefixed: list[bool] = []  # whether the tokenizer's dummy space belongs to the text
        self.slots: list[_Slot] = []
        # Of each segment: its slot's place in `slots`, its bytes in the run, first byte in the slot's text and bound.
        self.slot: list[int] = []
        self.length: list[int] = []
        self.at: list[int] = []
        self.bound: list[int] = []

    def add_slot(self, example: int, number: int, base: int, size: int | None, loss: bool) -> int:
        self.slots.append(_Slot(example, number, base, size, loss))
        return len(self.slots) - 1

    def add_segment(self, slot: int, length: int, at: int, bound: int) -> None:
        self.slot.append(slot)
        self.length.append(length)
        self.at.append(at)
        self.bound.append(bound)

    def close(self, example: int, ids: Sequence[int], size: int, segments: int) -> None:
        """End a run whose segments were added."""
        self.example.append(example)
        self.ids.append(ids)
        self.sizes.append(size)
        self.segments.append(segments)

    def add_special(self, slot: int, identity: int, at: int = 0) -> None:
        self.add_segment(slot, 0, at, at)
        self.close(self.slots[slot].example, (identity,), 0, 1)

    def add_text(self, slot: int, text: str, prefixed: bool) -> None:
        """Add the whole text of a slot."""
        if text:
            size = self.slots[slot].size or 0
            self.add_segment(slot, size, 0, size)
            self.close_text(self.slots[slot].example, text, size, 1, prefixed)

    def close_text(self, example: int, text: str, size: int, segments: int, prefixed: bool) -> None:
        self.text_at.append(len(self.ids))
        self.texts.append(text)
        self.prefixed.append(prefixed)
        self.close(example, (), size, segments)


def is_plain(slots: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an example is a plain text and no chat."""
    return all(slot["role"] == "text" for slot in slots)


def encode_texts(tokenizer: ByteTokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Encode raw texts, no special tokens added, special-looking text as plain text."""
    runs = _Runs()
    for example, text in enumerate(texts):
        runs.add_text(runs.add_slot(example, CONTENT, 0, _size(text), True), text, True)
    batch = _assemble(tokenizer, runs, np.zeros(len(texts), np.int64))
    ends = np.where(batch.ends % SCALE == 1, batch.ends - 1, batch.ends + SCALE - 1) // SCALE
    bounds = zip(batch.offsets[:-1], batch.offsets[1:], batch.exact, strict=True)
    return [Tokens(batch.ids[a:b], ends[a:b].astype(np.int32), bool(exact)) for a, b, exact in bounds]


def encode_examples(
    tokenizer: ByteTokenizer,
    chats: Chats,
    slots_per_example: Sequence[Sequence[Mapping[str, Any]]],
    ends_document: Sequence[bool] | None,
    options: Mapping[str, Any] | None = None,
) -> EncodedBatch:
    """Encode examples given as slots; `options` are variables of the chat template. See `ByteView.encode_examples`."""
    runs = _Runs()
    widths = np.empty(len(slots_per_example), np.int64)
    faithful = np.ones(len(slots_per_example), bool)
    for example, slots in enumerate(slots_per_example):
        if is_plain(slots):
            ends = ends_document is not None and bool(ends_document[example])
            widths[example] = _lay_out_text(tokenizer, runs, example, slots, ends)
        else:
            layout, spans = chats.layout(slots, **(options or {}))
            widths[example] = _lay_out_chat(runs, example, slots, layout, spans)
            faithful[example] = layout.faithful
    batch = _assemble(tokenizer, runs, SCALE * widths)
    batch.exact[:] &= faithful
    return batch


def _lay_out_text(
    tokenizer: ByteTokenizer, runs: _Runs, example: int, slots: Sequence[Mapping[str, Any]], ends: bool
) -> int:
    """Append an example's runs; return its width in units. Only its first text is at the start of a text."""
    if tokenizer.start_id is not None:
        runs.add_special(runs.add_slot(example, START_SLOT, 0, None, False), tokenizer.start_id)
    unit, loss = 1, False
    for number, slot in enumerate(slots):
        text, loss, size = slot["text"], bool(slot["loss"]), _size(slot["text"])
        place = runs.add_slot(example, SLOTS_PER_MESSAGE * number + CONTENT, unit + 1, size, loss)
        runs.add_text(place, text, number == 0)
        unit += size + 2
    if ends and tokenizer.eos_id is not None:
        place = runs.add_slot(example, SLOTS_PER_MESSAGE * len(slots) + 1, unit, None, loss)
        runs.add_special(place, tokenizer.eos_id)
    return unit + 1


def _lay_out_chat(
    runs: _Runs,
    example: int,
    slots: Sequence[Mapping[str, Any]],
    layout: Layout,
    spans: Sequence[tuple[int, int, int]],
) -> int:
    """Append an example's runs; return its width in units."""
    places, unit = [runs.add_slot(example, START_SLOT, 0, None, False)], 1
    for number, slot in enumerate(slots):
        size, loss = _size(slot["text"]), bool(slot["loss"]) and layout.whole[number]
        first = SLOTS_PER_MESSAGE * number
        places.append(runs.add_slot(example, first + 1, unit, None, False))
        places.append(runs.add_slot(example, first + 2, unit + 1, size, loss))
        places.append(runs.add_slot(example, first + 3, unit + 1 + size, None, loss))
        unit += size + 2
    places.append(runs.add_slot(example, SLOTS_PER_MESSAGE * len(slots) + 1, unit, None, False))
    texts = [slots[message]["text"][start:end] for message, start, end in spans]
    begins = [_size(slots[message]["text"][:start]) for message, start, _ in spans]
    stops = [begin + _size(text) for begin, text in zip(begins, texts, strict=True)]
    for section in layout.sections:
        _add_section(runs, section, places, (texts, begins, stops))
    return unit + 1


def _add_section(
    runs: _Runs,
    section: Section,
    places: Sequence[int],
    contents: tuple[list[str], list[int], list[int]],
) -> None:
    texts, begins, stops = contents
    parts, total = [], 0
    for piece in section.pieces:
        slot = runs.slots[places[piece.slot]]
        text = piece.text if piece.run < 0 else texts[piece.run]
        text = json_text(text) if piece.escaped else text
        length = _size(text)
        if piece.anchor == piece.run >= 0:
            at, bound = begins[piece.run], stops[piece.run]
        elif slot.size is None:
            at = bound = 0
        else:
            bound = begins[piece.bound] if piece.bound >= 0 else slot.size
            at = min((stops[piece.anchor] if piece.anchor >= 0 else 0) + piece.shift, bound)
        if section.identity >= 0:
            runs.add_special(places[piece.slot], section.identity, min(at + length, bound))
            return
        runs.add_segment(places[piece.slot], length, at, bound)
        parts.append(text)
        total += length
    runs.close_text(slot.example, "".join(parts), total, len(parts), section.prefixed)


def _assemble(tokenizer: ByteTokenizer, runs: _Runs, widths: np.ndarray) -> EncodedBatch:
    for position, ids in zip(runs.text_at, tokenizer.text_ids(runs.texts, runs.prefixed), strict=True):
        runs.ids[position] = ids
    counts = np.fromiter(map(len, runs.ids), np.int64, len(runs.ids))
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(runs.ids), np.int32, total)
    begins, ends, exact_run = _byte_places(tokenizer, runs, ids, counts)
    segment = _segments(runs, counts, begins, ends)

    slots = np.array(
        [(s.example, s.number, s.base, -1 if s.size is None else s.size, s.loss) for s in runs.slots], np.int64
    )
    slots = slots.reshape(-1, 5)
    length, at, bound = (np.asarray(values, np.int64) for values in (runs.length, runs.at, runs.bound))
    stop = np.cumsum(length)
    slot = np.asarray(runs.slot, np.int64)[segment]
    _, number, base, size, loss = slots[slot].T
    # A text token closes the unit of its last byte; a template slot is one unit that only its last token closes.
    closed = np.minimum(at[segment] + np.minimum(ends, stop[segment]) - (stop - length)[segment], bound[segment])
    scaled = SCALE * (base + np.where(size < 0, 0, closed))
    last = np.append(slot[1:] != slot[:-1], True)[:total]
    scaled[last] = SCALE * (base + np.where(size < 0, 1, size))[last]
    scaled[(size < 0) & ~last] += 1
    _mark_widthless(scaled, SCALE * base, (size >= 0) & ~last)

    example = np.asarray(runs.example, np.int64)
    exact = np.ones(len(widths), bool)
    exact[example[~exact_run]] = False
    per_example = np.bincount(example, counts, len(widths)).astype(np.int64)
    return EncodedBatch(
        ids=ids,
        offsets=np.concatenate(([0], np.cumsum(per_example))),
        ends=scaled,
        slot=number.astype(np.int32),
        loss=loss.astype(bool),
        exact=exact,
        widths=widths,
        first=tokenizer.first_bytes[ids],
    )


def _byte_places(
    tokenizer: ByteTokenizer, runs: _Runs, ids: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (first byte, end) of each token in the runs laid end to end, int64 [N], and whether each run is exact."""
    lengths = tokenizer.lengths[ids].astype(np.int64)
    sizes, texts = np.asarray(runs.sizes, np.int64), np.asarray(runs.text_at, np.int64)
    starts = np.cumsum(counts) - counts
    # The dummy space of SentencePiece is no byte of the text: the run's first token gives it up.
    dummy = np.zeros(len(counts), bool)
    if tokenizer.prefix_space:
        dummy[texts] = runs.prefixed
        dummy &= _sums(lengths, starts) == sizes + 1
        lengths[starts[dummy]] -= 1
    exact = _sums(lengths, starts) == sizes
    expected = [
        b" " + text.encode() if trim else text.encode()
        for text, trim in zip(runs.texts, dummy[texts].tolist(), strict=True)
    ]
    if not exact.all() or tokenizer.join(ids) != b"".join(expected):
        found = (tokenizer.join(runs.ids[run]) for run in runs.text_at)
        exact[texts] &= np.fromiter(map(bytes.__eq__, found, expected), bool, len(expected))
    inexact = []
    for run, text in zip(runs.text_at, runs.texts, strict=True):
        if not exact[run] and counts[run]:
            own = tokenizer.lengths_in(text.encode(), runs.ids[run])
            exact[run] = own is not None
            if own is None:
                inexact.append((run, text))
            else:
                lengths[starts[run] : starts[run] + counts[run]] = own
    within = np.cumsum(lengths) - np.repeat(np.cumsum(_sums(lengths, starts)) - _sums(lengths, starts), counts)
    for run, text in inexact:
        place = slice(starts[run], starts[run] + counts[run])
        within[place] = tokenizer.estimated_ends(text, int(counts[run]), within[place])
    first = np.repeat(np.cumsum(sizes) - sizes, counts)
    ends = within + first
    begins = np.append(0, ends)[: len(ends)]
    return np.maximum(begins, first), ends, exact


def _sums(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of each run that begins at `starts`; runs may be empty."""
    return np.diff(np.concatenate(([0], np.cumsum(lengths)))[np.append(starts, len(lengths))])


def _segments(runs: _Runs, counts: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return int64 [N]: the segment of each token; see the module for those that lie in several."""
    several = np.asarray(runs.segments, np.int64)
    first = np.cumsum(several) - several
    found = np.repeat(first, counts)
    crossing = np.flatnonzero(np.repeat(several > 1, counts))
    if not len(crossing):
        return found
    stop = np.cumsum(np.asarray(runs.length, np.int64))
    is_text = np.array([runs.slots[slot].size is not None for slot in runs.slot])
    text_before = np.maximum.accumulate(np.where(is_text, np.arange(len(is_text)), -1))
    lowest, begin, end = found[crossing], begins[crossing], ends[crossing]
    own = np.maximum(np.searchsorted(stop, end), lowest)
    text = text_before[own]
    found[crossing] = np.where((text >= lowest) & (stop[text] > begin), text, own)
    return found


def _mark_widthless(ends: np.ndarray, base: np.ndarray, text: np.ndarray) -> None:
    """Move, in place, text tokens without width off the units that can match: they ride with the token after them."""
    at_start = text & (ends == base)
    follows = np.append(ends[1:] == ends[:-1], False)[: len(ends)] & text & ~at_start
    ends[at_start] += 1
    ends[follows] -= 1


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
