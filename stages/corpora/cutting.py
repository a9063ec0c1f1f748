"""Cut documents into examples of at most `max_bytes` UTF-8 bytes: text once, here, and nowhere else."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Turn(NamedTuple):
    """A message: role ("text" for plain text), its text, whether it is trained on, its other fields as JSON or ""."""

    role: str
    text: str
    loss: bool = True
    extra: str = ""


_WHITESPACE = (b" ", b"\t", b"\n", b"\r", b"\f", b"\v")


def cut_text(text: str, max_bytes: int) -> list[str]:
    """Cut text into pieces of at most `max_bytes` bytes which joined give the text; never inside a character.

    A piece ends after the last newline if that fills at least half of it, else before the last whitespace (so that a
    word keeps the space before it), else, in a run without whitespace, at the last whole character. `max_bytes` is 4
    or more.
    """
    data = text.encode()
    pieces, at = [], 0
    while len(data) - at > max_bytes:
        end = _cut_at(data, at, at + max_bytes)
        pieces.append(data[at:end].decode())
        at = end
    return [*pieces, data[at:].decode()] if at < len(data) or not pieces else pieces


def _cut_at(data: bytes, start: int, limit: int) -> int:
    newline = data.rfind(b"\n", start, limit) + 1
    if newline - start >= (limit - start) // 2:
        return newline
    space = max(data.rfind(white, start + 1, limit + 1) for white in _WHITESPACE)
    if space > start:
        return space
    while data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def cut_turns(turns: list[Turn], max_bytes: int) -> list[list[Turn]]:
    """Cut a chat into examples of at most `max_bytes` bytes of content.

    Exchanges (what leads up to an answer, and the answer) stay together where they fit; a longer one is cut between
    turns; a single turn that is longer becomes plain text (role "text", same loss), cut like any text.
    """
    examples: list[list[Turn]] = []
    for unit in _merged(_exchanges(turns), max_bytes):
        if _size(unit) <= max_bytes:
            examples.append(unit)
            continue
        for part in _merged(([turn] for turn in unit), max_bytes):
            if _size(part) <= max_bytes:
                examples.append(part)
            else:
                long = part[0]
                examples += [[Turn("text", piece, long.loss)] for piece in cut_text(long.text, max_bytes)]
    return examples


def _exchanges(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Yield runs of turns that end with the last of the answers to one question."""
    unit: list[Turn] = []
    for turn in turns:
        if unit and unit[-1].role == "assistant" and turn.role != "assistant":
            yield unit
            unit = []
        unit.append(turn)
    if unit:
        yield unit


def _merged(units: Iterable[list[Turn]], max_bytes: int) -> Iterator[list[Turn]]:
    """Join neighbouring units as long as they fit."""
    current: list[Turn] = []
    for unit in units:
        if current and _size(current) + _size(unit) > max_bytes:
            yield current
            current = []
        current = current + unit
    if current:
        yield current


def _size(turns: list[Turn]) -> int:
    return sum(len(turn.text.encode()) for turn in turns)
