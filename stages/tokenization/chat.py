"""Chats as sections: what a template renders of a conversation, cut where special tokens stand and where slots begin.

Contents never pass through the template as they are: it renders their shapes (`stages.tokenization.shapes`), once for
all conversations of the same shapes. So nothing in a text can become a special token, unless it is a text that the
template itself looks for in contents, like `</think>`.
"""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from stages.artifacts.schemas import REASONING
from stages.core.errors import UserError
from stages.tokenization.byte_tokens import ByteTokenizer, Special
from stages.tokenization.rendering import ESCAPED, PLACEHOLDERS, ChatTemplate, TemplateRefusal
from stages.tokenization.shapes import MOST_RUNS, sought_by
from stages.tokenization.turns import CALLS, RUN, Rendering, Turn, TurnFinder, run_of

MOST_LAYOUTS = 4096  # kept at once
SLOTS_PER_MESSAGE = 3
CONTENT = 2  # place of the content among a message's slots: start 0 | header 1 | content 2 | end of turn 3 | ...

Slots = Sequence[Mapping[str, Any]]
ANSWER = chr(PLACEHOLDERS + MOST_RUNS - 1)  # stands for any
_OPENED = re.compile(r"<(\w+)>\s*\Z")


class Piece(NamedTuple):
    """A part of a section within one slot: `text` of the template, or the content `run` (-1: none).

    Of a content slot, a run is its own `anchor`; another piece begins `shift` bytes after the end of run `anchor` (-1:
    after the start of the content), and before run `bound` (-1: before the end of the content).
    """

    text: str
    run: int
    escaped: bool
    slot: int
    anchor: int = -1
    shift: int = 0
    bound: int = -1


class Section(NamedTuple):
    """A special token (`identity` >= 0, one piece), or all text between two; `prefixed`: it gets a dummy space."""

    identity: int
    pieces: tuple[Piece, ...]
    prefixed: bool = False


@dataclass(frozen=True)
class Layout:
    """A rendering as sections. `whole`: of each message, whether all is there; `faithful`: it is the template's."""

    sections: tuple[Section, ...]
    whole: tuple[bool, ...]
    faithful: bool


class Chats:
    """A tokenizer's chat template, applied to conversations given as slots of the EXAMPLES schema."""

    def __init__(self, template: ChatTemplate, tokenizer: ByteTokenizer) -> None:
        self._find, specials = tokenizer.find_specials, tokenizer.special_texts
        self._sought = sought_by(template.source, template.variables)
        longest_first = sorted(specials, key=len, reverse=True)
        written = re.compile("|".join(map(re.escape, longest_first))) if specials else None
        self._foreign = re.compile("|".join([*map(re.escape, longest_first), RUN.pattern]))
        try:
            self._turns = TurnFinder(template, written, tokenizer.name)
        except UserError as refused:
            try:
                template = replace(template, parts=True)
                self._turns = TurnFinder(template, written, tokenizer.name)
            except UserError:
                raise refused from None
        self._template = template
        self._layouts: dict[Any, Layout] = {}
        self._leads: dict[Any, tuple[str, str]] = {}
        # Special tokens that the template reads in contents.
        self.readable = frozenset(identity for text, identity in specials.items() if text in self._sought.texts)

    def layout(self, slots: Slots, **options: Any) -> tuple[Layout, list[tuple[int, int, int]]]:
        """Return how a conversation is rendered, and (message, start, end) of each run of its texts, in characters."""
        turns, spans, foreign, key = self._read_all(slots, options)
        if key not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._made(slots, turns, spans, foreign, options)
        return self._layouts[key], spans

    def leads(self, slots: Slots, **options: Any) -> tuple[str, str]:
        """Return (text of the template between a prompt and the content of an answer, start of a block that it opens).

        `options` ask for an answer after `slots`.
        """
        turns, _, _, key = self._read_all(slots, options)
        if key not in self._leads:
            self._leads[key] = self._found_leads(turns, options)
        return self._leads[key]

    def _found_leads(self, turns: list[Turn], options: dict[str, Any]) -> tuple[str, str]:
        prompt = self._turns.find(turns, **options).text
        if opened := _OPENED.search(prompt):
            return "", opened[0]
        answer = Turn({"role": "assistant", "content": ANSWER}, ANSWER, MOST_RUNS - 1, MOST_RUNS)
        answered = self._turns.find([*turns, answer]).text
        return answered[len(prompt) : answered.rfind(ANSWER)] if answered.startswith(prompt) else "", ""

    def untrained(self, slots: Slots) -> int:
        """Return how many turns are to be trained on and are not, since the template leaves a part of them out."""
        layout, _ = self.layout(slots)
        return sum(bool(slot["loss"]) and not whole for slot, whole in zip(slots, layout.whole, strict=True))

    def _read_all(
        self, slots: Slots, options: Mapping[str, Any]
    ) -> tuple[list[Turn], list[tuple[int, int, int]], list[str], Any]:
        """Return a conversation as turns, (message, start, end) of their runs, what `_read` adds, a key of all."""
        turns, spans, foreign, key = [], [], [], []
        for number, slot in enumerate(slots):
            turn, own = self._read(slot, len(spans), foreign)
            turns.append(turn)
            spans += [(number, *span) for span in own]
            key.append((slot["role"], turn.text, slot.get("extra") and json.dumps(turn.message)))
        return turns, spans, foreign, (tuple(key), tuple(foreign), tuple(options.items()))

    def _read(self, slot: Mapping[str, Any], first: int, foreign: list[str]) -> tuple[Turn, list[tuple[int, int]]]:
        """Return a message of shapes with placeholders from `first` on, and the spans of the text that they stand for.

        Texts in other fields that look like special tokens are added to `foreign`; the last placeholders are theirs.
        """
        message = message_of(slot)
        reasoning, content = message.get("reasoning_content"), message["content"]
        head, spans = "", []
        if reasoning is not None:
            shape = self._sought.shape(reasoning, first)
            message["reasoning_content"] = shape.text
            shift = REASONING.index("{}")
            spans = [(start + shift, end + shift) for start, end in shape.spans]
            head = REASONING.format(shape.text)
        if content is not None:
            shape = self._sought.shape(content, first + len(spans))
            message["content"] = shape.text
            shift = len(slot["text"]) - len(content)
            spans += [(start + shift, end + shift) for start, end in shape.spans]
        for key in message.keys() - {"role", "content", "reasoning_content"}:
            message[key] = self._defused(message[key], foreign)
        return Turn(message, head + (message["content"] or ""), first, first + len(spans)), spans

    def _defused(self, value: Any, foreign: list[str]) -> Any:
        if isinstance(value, str):
            return self._foreign.sub(lambda match: _kept(match[0], foreign), value)
        if isinstance(value, list):
            return [self._defused(item, foreign) for item in value]
        if isinstance(value, dict):
            return {key: self._defused(item, foreign) for key, item in value.items()}
        return value

    def _made(
        self,
        slots: Slots,
        turns: list[Turn],
        spans: list[tuple[int, int, int]],
        foreign: list[str],
        options: dict[str, Any],
    ) -> Layout:
        rendering = self._turns.find(turns, **options)
        texts = [slots[message]["text"][start:end] for message, start, end in spans]
        filled = RUN.sub(lambda match: _text_of(match[0], texts, foreign), rendering.text)
        try:
            faithful = filled == self._template.render([message_of(slot) for slot in slots], **options)
        except TemplateRefusal:
            faithful = not rendering.refused  # put together of what the template takes
        there = {run_of(rendering.text[place]) for place in rendering.runs}
        whole = [
            there.issuperset(range(turn.first, turn.stop))
            and (not any(map(turn.message.get, CALLS)) or self._turns.renders_calls(turns, i, rendering.text))
            for i, turn in enumerate(turns)
        ]
        return Layout(tuple(self._sections(rendering, foreign)), tuple(whole), faithful)

    def _sections(self, rendering: Rendering, foreign: list[str]) -> list[Section]:
        text = rendering.text
        pieces = _Pieces(rendering, foreign)
        sections, before = [], Special(0, 0, -1, True)
        for special in [*self._find(text), Special(len(text), len(text), -1)]:
            if found := tuple(pieces.between(before.end, special.start)):
                sections.append(Section(-1, found, before.prefixes))
            if special.identity >= 0:
                sections.append(Section(special.identity, (pieces.special(special),)))
            before = special
        return sections


def message_of(slot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message of a slot, as its data set has it."""
    fields = json.loads(slot["extra"]) if slot.get("extra") else {}
    text, reasoning = slot["text"], fields.get("reasoning_content")
    head = REASONING.format(reasoning) if isinstance(reasoning, str) else ""
    return {"role": slot["role"], "content": text.removeprefix(head), **fields}


class _Pieces:
    """Cuts a rendering into pieces, from left to right; see Piece."""

    def __init__(self, rendering: Rendering, foreign: list[str]) -> None:
        self._text, self._foreign = rendering.text, foreign
        self._runs = deque(rendering.runs)  # places of those to come
        bounds = [(0, 0)] if rendering.opening else []
        for number, cut in enumerate(rendering.cuts):
            first = SLOTS_PER_MESSAGE * number + 1
            bounds += [(cut.start, first), (cut.content, first + 1), (cut.content_end, first + 2)]
        last = SLOTS_PER_MESSAGE * len(rendering.cuts) + 1
        self._bounds = [*bounds, (rendering.cuts[-1].end, last), (len(self._text), last)]
        self._slot = -1
        self._anchor, self._shift = -1, 0

    def between(self, start: int, end: int) -> list[Piece]:
        """Return the pieces of the text from `start` to `end`; calls go from left to right."""
        pieces = []
        for (left, slot), (right, _) in zip(self._bounds, self._bounds[1:], strict=False):
            at, stop = max(left, start), min(right, end)
            while at < stop:
                match = RUN.search(self._text, at, stop)
                upto = match.start() if match else stop
                if upto > at:
                    pieces.append(self._literal(self._text[at:upto], slot))
                if match:
                    pieces.append(self._placeholder(match, slot))
                at = upto + bool(match)
        return pieces

    def special(self, special: Special) -> Piece:
        """Return the piece of a special token: it belongs to the slot of its last character that is no white space."""
        end = special.start + len(self._text[special.start : special.end].rstrip())
        slot = next(slot for left, slot in reversed(self._bounds) if left < max(end, special.start + 1))
        return self._literal(self._text[special.start : special.end], slot)

    def _literal(self, text: str, slot: int) -> Piece:
        piece = Piece(text, -1, False, slot, *self._place(slot))
        self._shift += len(text.encode())
        return piece

    def _placeholder(self, match: re.Match[str], slot: int) -> Piece:
        run, escaped = run_of(match[0]), ord(match[0]) >= PLACEHOLDERS + ESCAPED
        if run >= MOST_RUNS:
            return self._literal(_text_of(match[0], [], self._foreign), slot)
        if not self._runs or match.start() != self._runs[0]:
            return Piece("", run, escaped, slot, *self._place(slot))
        self._runs.popleft()
        self._slot, self._anchor, self._shift = slot, run, 0
        return Piece("", run, escaped, slot, run)

    def _place(self, slot: int) -> tuple[int, int, int]:
        """Return anchor, shift and bound of a piece that stands here and is no run of its slot."""
        if slot % SLOTS_PER_MESSAGE != CONTENT:
            return -1, 0, -1
        if slot != self._slot:
            self._slot, self._anchor, self._shift = slot, -1, 0
        return self._anchor, self._shift, self._bound(slot)

    def _bound(self, slot: int) -> int:
        """Return the next run in the same slot, -1 for none."""
        end = next(left for left, other in self._bounds if other > slot)
        return run_of(self._text[self._runs[0]]) if self._runs and self._runs[0] < end else -1


def _kept(text: str, foreign: list[str]) -> str:
    foreign.append(text)
    return chr(PLACEHOLDERS + MOST_RUNS + len(foreign) - 1)


def _text_of(placeholder: str, texts: Sequence[str], foreign: Sequence[str]) -> str:
    run = run_of(placeholder)
    text = texts[run] if run < MOST_RUNS else foreign[run - MOST_RUNS]
    return json_text(text) if ord(placeholder) >= PLACEHOLDERS + ESCAPED else text


def json_text(text: str) -> str:
    """Return a text as it stands within a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
