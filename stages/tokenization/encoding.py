"""Texts and chats to flat numpy arrays of tokens with byte coordinates that any two tokenizers share.

Coordinates. Every tokenizer lays an example out in the same units, from the row alone: a text slot of n bytes
has n units, each template slot has one. Slots of an example with M messages (a plain text is one message):

    0 start | 1+3m header | 2+3m text | 3+3m end of turn | 3M+1 end of document

A token's `ends` is SCALE times the unit at which it ends, counted from the example's start. Only multiples of SCALE
can match between tokenizers: tokens inside a template slot and tokens of no width get values in between.

What stands between two special tokens of the template, template text and contents, is tokenized together, as a
tokenizer does with what a template renders. A token that holds bytes of both belongs to the content. Whitespace that a
template takes off the ends of a content has no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.tokenization.layout import END, SLOTS_PER_MESSAGE, START_SLOT, TEXT, Layout, Part
from stages.tokenization.rendering import Message
from stages.tokenization.template import Template

SCALE = 4


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


class Speller(Protocol):
    """What encoding asks of a tokenizer: see `ByteView`."""

    prefix_space: str | None
    start_id: int | None
    eos_id: int | None
    lengths: np.ndarray
    first_bytes: np.ndarray
    template: Template

    def special_named(self, content: str) -> int | None: ...  # noqa: D102
    def text_ids(self, texts: Sequence[str], prefixed: Sequence[bool]) -> list[Sequence[int]]: ...  # noqa: D102
    def join(self, ids: Iterable[int]) -> bytes: ...  # noqa: D102
    def estimated_ends(self, text: str, count: int, fallback: np.ndarray) -> np.ndarray: ...  # noqa: D102
    def template_pieces(self, layout: Layout) -> Sequence[Part | tuple[int, int]]: ...  # noqa: D102


class _Pieces:
    """Pieces of examples in order: special tokens, and stretches of text; neighbouring stretches are one segment.

    Lists over pieces: `example`, `slot`, `base` (first unit), `loss`, `content` (text of the example, not of its
    template), `size` (bytes; -1 for a special token), `segment`.
    """

    def __init__(self) -> None:
        self.example: list[int] = []
        self.slot: list[int] = []
        self.base: list[int] = []
        self.loss: list[bool] = []
        self.content: list[bool] = []
        self.size: list[int] = []
        self.segment: list[int] = []
        self.texts: list[list[str]] = []  # of each segment
        self.prefixed: list[bool] = []  # whether the tokenizer's dummy space belongs to the segment
        self.ids: list[Sequence[int]] = []  # of each segment, one special token or what the tokenizer makes of the text
        self.open = False

    def add_special(self, example: int, slot: int, base: int, loss: bool, identity: int) -> None:
        self._add(example, slot, base, loss, False, -1)
        self.texts.append([])
        self.prefixed.append(False)
        self.ids.append((identity,))
        self.segment.append(len(self.ids) - 1)
        self.open = False

    def add_text(
        self, example: int, slot: int, base: int, loss: bool, content: bool, text: str, size: int, prefixed: bool
    ) -> None:
        if not text:
            return
        self._add(example, slot, base, loss, content, size)
        if not self.open:
            self.texts.append([])
            self.prefixed.append(prefixed)
            self.ids.append(())
            self.open = True
        self.texts[-1].append(text)
        self.segment.append(len(self.ids) - 1)

    def _add(self, example: int, slot: int, base: int, loss: bool, content: bool, size: int) -> None:
        self.example.append(example)
        self.slot.append(slot)
        self.base.append(base)
        self.loss.append(loss)
        self.content.append(content)
        self.size.append(size)


def encode_texts(view: Speller, texts: Sequence[str]) -> list[Tokens]:
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
    view: Speller,
    slots_per_example: Sequence[Sequence[Mapping[str, Any]]],
    ends_document: Sequence[bool] | None,
    bare: bool = False,
    prompted: bool = False,
    thinking: bool | None = None,
) -> EncodedBatch:
    """Encode examples given as slots {"role", "text", "loss"}; see `ByteView.encode_examples`."""
    pieces = _Pieces()
    widths = np.empty(len(slots_per_example), np.int64)
    for example, slots in enumerate(slots_per_example):
        pieces.open = False
        if all(slot["role"] == "text" for slot in slots):
            ends = ends_document is not None and bool(ends_document[example])
            widths[example] = SCALE * _lay_out_text(view, pieces, example, slots, ends, bare)
        else:
            widths[example] = SCALE * _lay_out_chat(view, pieces, example, slots, prompted, thinking)
    places = [place for place, texts in enumerate(pieces.texts) if texts]
    joined = ["".join(pieces.texts[place]) for place in places]
    found = view.text_ids(joined, [pieces.prefixed[place] for place in places])
    for place, ids in zip(places, found, strict=True):
        pieces.ids[place] = ids
    return _assemble(view, pieces, dict(zip(places, joined, strict=True)), widths)


def _lay_out_text(
    view: Speller, pieces: _Pieces, example: int, slots: Sequence[Mapping[str, Any]], ends: bool, bare: bool
) -> int:
    """Append a plain text, whose slots are tokenized each by itself; return its width in units.

    Only the first slot is at the start of a text, where a tokenizer may add its dummy space.
    """
    if not bare and view.start_id is not None:
        pieces.add_special(example, START_SLOT, 0, False, view.start_id)
    unit, loss = 1, False
    for number, slot in enumerate(slots):
        text, loss = slot["text"], bool(slot["loss"])
        size = _size(text)
        pieces.open = False
        pieces.add_text(example, number * SLOTS_PER_MESSAGE + TEXT, unit + 1, loss, True, text, size, number == 0)
        unit += size + 2
    if ends and not bare and view.eos_id is not None:
        pieces.add_special(example, len(slots) * SLOTS_PER_MESSAGE + 1, unit, loss, view.eos_id)
    return unit + 1


def _lay_out_chat(
    view: Speller,
    pieces: _Pieces,
    example: int,
    slots: Sequence[Mapping[str, Any]],
    prompted: bool,
    thinking: bool | None,
) -> int:
    """Append a chat; return its width in units.

    A turn of which the template shows a part alone, without its reasoning say, is not trained on.
    """
    messages = [Message(slot["role"], slot["text"], slot.get("extra") or "") for slot in slots]
    shapes = [view.template.shape(message.text) for message in messages]
    layout = view.template.layout(messages, shapes, prompted, thinking)
    sizes = [_size(message.text) for message in messages]
    units = [1]  # of the header of each message, and of the end of the document
    for size in sizes:
        units.append(units[-1] + size + 2)
    loss = [bool(slot["loss"]) and number not in layout.silent | layout.dropped for number, slot in enumerate(slots)]
    at = [0] * len(slots)  # characters of each content that are laid out
    fresh = True
    for part in view.template_pieces(layout):
        slot, identity = (part.slot, None) if isinstance(part, Part) else part
        message, kind = divmod(slot - 1, SLOTS_PER_MESSAGE) if slot else (0, -1)
        base = units[message] if slot else 0
        trained = kind + 1 in (TEXT, END) and message < len(slots) and loss[message]
        if kind + 1 == TEXT:
            text = messages[message].text
            if isinstance(part, Part) and part.content:
                start, stop = _stretch(part, shapes[message].runs, at[message])
                at[message] = stop
                base += 1 + _size(text[:start])
                literal = text[start:stop]
            else:
                base += 1 + _size(text[: at[message]])
                literal = part.literal if isinstance(part, Part) else ""
        else:
            literal = part.literal if isinstance(part, Part) else ""
            base += 1 + sizes[message] if kind + 1 == END else 0
        if identity is not None:
            pieces.add_special(example, slot, base, trained, identity)
        else:
            dummy = view.prefix_space == "always" or fresh
            content = isinstance(part, Part) and part.content
            pieces.add_text(example, slot, base, trained, content, literal or "", _size(literal or ""), dummy)
        fresh = False
    return units[-1] + 1


def _stretch(part: Part, runs: Sequence[tuple[int, int]], at: int) -> tuple[int, int]:
    """Return (start, end) of a part of a content in characters; `at`: where the part before it ends."""
    if part.literal is None:
        return runs[part.run]
    # What stays verbatim before the first run ends where that begins.
    first = runs[0][0] if runs else len(part.literal)
    start = at if at else max(0, first - len(part.literal))
    return start, start + len(part.literal)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _assemble(view: Speller, pieces: _Pieces, texts: dict[int, str], widths: np.ndarray) -> EncodedBatch:
    counts = np.fromiter(map(len, pieces.ids), np.int64, len(pieces.ids))
    ids = np.fromiter(chain.from_iterable(pieces.ids), np.int32, int(counts.sum()))
    segment = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    byte_ends, good = _byte_ends(view, pieces, texts, ids, starts, counts)
    piece, clipped = _piece_of(pieces, segment, byte_ends, starts, counts)
    as_array = {name: np.asarray(getattr(pieces, name), np.int64) for name in ("example", "slot", "base")}
    example, slot, base = (as_array[name][piece] for name in ("example", "slot", "base"))
    content = np.asarray(pieces.content, bool)[piece]
    # A template slot is one unit that only its last token closes; a text token closes the unit of its last byte.
    ends = SCALE * base + np.where(content, SCALE * clipped, 1)
    new = np.ones(len(ids) + 1, bool)
    new[1:-1] = (slot[1:] != slot[:-1]) | (example[1:] != example[:-1])
    closing = np.flatnonzero(new[1:] & ~content & ((slot - 1) % SLOTS_PER_MESSAGE + 1 != TEXT))
    ends[closing] += SCALE - 1
    _mark_widthless(ends, content & (clipped == 0), slot, example)
    segment_example = np.zeros(len(counts), np.int64)
    segment_example[np.asarray(pieces.segment, np.int64)] = as_array["example"]
    exact = np.ones(len(widths), bool)
    exact[segment_example[~good]] = False
    per_example = np.bincount(example, minlength=len(widths)) if len(ids) else np.zeros(len(widths), np.int64)
    return EncodedBatch(
        ids=ids,
        offsets=np.concatenate(([0], np.cumsum(per_example))).astype(np.int64),
        ends=ends,
        slot=slot.astype(np.int32),
        loss=np.asarray(pieces.loss, bool)[piece],
        exact=exact,
        widths=widths,
        first=view.first_bytes[ids],
    )


def _piece_of(
    pieces: _Pieces, segment: np.ndarray, byte_ends: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (piece of each token, where the token ends in it in bytes)."""
    of_segment = np.asarray(pieces.segment, np.int64)
    sizes = np.maximum(np.asarray(pieces.size, np.int64), 0)
    content = np.asarray(pieces.content, bool)
    total = np.bincount(of_segment, sizes, len(counts)).astype(np.int64)
    before = np.cumsum(total + 1) - (total + 1)  # one more for each segment keeps their ends apart
    cumulated = np.cumsum(sizes)
    first_piece = np.searchsorted(of_segment, np.arange(len(counts)))
    piece_end = cumulated - (cumulated - sizes)[first_piece][of_segment]  # within the segment
    piece = np.searchsorted(before[of_segment] + piece_end, before[segment] + byte_ends, side="left")
    piece = np.maximum(np.minimum(piece, len(of_segment) - 1), first_piece[segment]) if len(of_segment) else piece
    piece_start = piece_end - sizes
    token_start = np.zeros_like(byte_ends)
    token_start[1:] = byte_ends[:-1]
    token_start[starts[counts > 0]] = 0
    # A token that began in a content belongs to it, though template text ends it.
    crossing = ~content[piece] & (token_start < piece_start[piece])
    earlier = np.maximum(piece - 1, 0)
    crossing &= content[earlier] & (of_segment[earlier] == segment)
    piece = np.where(crossing, earlier, piece)
    return piece, np.minimum(byte_ends, piece_end[piece]) - piece_start[piece]


def _byte_ends(
    view: Speller, pieces: _Pieces, texts: dict[int, str], ids: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (byte end of each token within its segment, 0 for a special token; whether each segment is exact)."""
    exact = np.ones(len(counts), bool)
    if not texts:
        return np.zeros(len(ids), np.int64), exact
    at = np.fromiter(texts, np.int64, len(texts))
    sizes = np.fromiter(map(_size, texts.values()), np.int64, len(texts))
    empty = counts[at] == 0  # text that became no token at all: a vocabulary without these characters
    exact[at[empty]] = False
    if empty.all():
        return np.zeros(len(ids), np.int64), exact
    at, sizes, kept = (
        at[~empty],
        sizes[~empty],
        [text for text, gone in zip(texts.values(), empty, strict=True) if not gone],
    )
    is_text = np.zeros(len(counts), bool)
    is_text[at] = True
    lengths = np.where(np.repeat(is_text, counts), view.lengths[ids].astype(np.int64), 0)
    cumulated = np.concatenate(([0], np.cumsum(lengths)))
    sums = cumulated[starts[at] + counts[at]] - cumulated[starts[at]]
    prefixed = np.asarray(pieces.prefixed, bool)[at]
    dummy = (sums == sizes + 1) & prefixed if view.prefix_space else np.zeros(len(at), bool)
    # The dummy space of SentencePiece is no byte of the text: the segment's first token gives it up.
    lengths[starts[at[dummy]]] -= 1
    good = (sums == sizes) | dummy
    expected = [
        b" " + text.encode() if trim else text.encode() for text, trim in zip(kept, dummy.tolist(), strict=True)
    ]
    if not good.all() or view.join(chain.from_iterable(pieces.ids[i] for i in at)) != b"".join(expected):
        good &= np.fromiter((view.join(pieces.ids[i]) == e for i, e in zip(at, expected, strict=True)), bool, len(at))
    exact[at] = good
    cumulated = np.cumsum(lengths)
    ends = cumulated - np.repeat((cumulated - lengths)[np.minimum(starts, len(ids) - 1)], counts)
    for k in np.flatnonzero(~good):
        begin, count = starts[at[k]], counts[at[k]]
        ends[begin : begin + count] = view.estimated_ends(kept[k], count, ends[begin : begin + count])
    return ends, exact


def _mark_widthless(ends: np.ndarray, at_start: np.ndarray, slot: np.ndarray, example: np.ndarray) -> None:
    """Move, in place, text tokens without width off the units that can match: they ride with the token after them."""
    ends[at_start] += 1
    follows = np.zeros(len(ends), bool)
    same = (ends[1:] == ends[:-1]) & (slot[1:] == slot[:-1]) & (example[1:] == example[:-1])
    follows[:-1] = same & (ends[:-1] % SCALE == 0)
    ends[follows] -= 1
