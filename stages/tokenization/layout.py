"""Where the contents of a conversation stand in what a template renders, and which turn each piece of template is of.

A layout is that of all conversations with the same roles and shapes (`rendering.Shape`), found by rendering them once,
and their beginnings. The pieces of a message m (from 0) belong to the slots that `encoding` lays out: header 1 + 3m,
text 2 + 3m, end of turn 3 + 3m. Between two contents, the end of the first turn is what the rendering has in common
with that of the messages up to it; the header of the next turn is the rest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, NamedTuple

from stages.tokenization.rendering import (
    FIRST_MARK,
    REASONED,
    REASONING,
    THINK,
    Message,
    Shape,
    TemplateRefusal,
    reads_reasoning,
    render,
)

START_SLOT = 0
SLOTS_PER_MESSAGE = 3
HEADER, TEXT, END = 1, 2, 3


@dataclass(frozen=True)
class Part:
    """A stretch of a rendering.

    `literal`: its text, None where it is run number `run` of a content. `content`: whether it is text of the message
    (a run, or what stays verbatim of a shape) and not of the template. `slot`: see the module.
    """

    slot: int
    literal: str | None
    run: int = -1
    content: bool = False

    @property
    def message(self) -> int:
        """The number of the message that it belongs to."""
        return (self.slot - 1) // SLOTS_PER_MESSAGE


@dataclass(frozen=True)
class Layout:
    """The parts of a rendering in order. `dropped`: messages with a run of text that the template leaves out.

    `silent`: messages with tool calls that the rendering does not show.
    """

    parts: tuple[Part, ...]
    dropped: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()

    def text_of(self, slot: int) -> str:
        """Return the template text of a slot."""
        return "".join(part.literal or "" for part in self.parts if part.slot == slot)


class Source(NamedTuple):
    """A Jinja chat template, its variables, and the written forms of special tokens, which are atoms of its text."""

    template: str
    variables: dict[str, str]
    specials: tuple[str, ...]


class Rendered:
    """One rendering of a conversation and those of its beginnings, cut at the private characters."""

    def __init__(
        self,
        source: Source,
        messages: Sequence[Message],
        shapes: Sequence[Shape],
        prompted: bool,
        thinking: bool | None,
        parsed: bool = False,
    ) -> None:
        """`parsed`: give the arguments of tool calls, which many data sets hold as JSON text, as objects."""
        self.source, self.messages, self.shapes, self.prompted = source, messages, shapes, prompted
        self.options = source.variables | ({} if thinking is None else {"enable_thinking": thinking})
        firsts = [0]
        for shape in shapes:
            firsts.append(firsts[-1] + len(shape.runs))
        self.firsts = firsts
        self.values = [
            _fields(source.template, message, shape.marked(first), parsed)
            for message, shape, first in zip(messages, shapes, firsts, strict=False)
        ]
        self.text = self._rendered(self.values, prompted)
        self._blank_as_it_is()
        self.marks = [(at, ord(c) - FIRST_MARK) for at, c in enumerate(self.text) if _is_mark(c)]

    def _blank_as_it_is(self) -> None:
        """Give contents of whitespace as they are where the template does otherwise than keep them."""
        blank = {number: shape.blank for number, shape in enumerate(self.shapes) if shape.blank}
        if not blank:
            return
        values = [value | ({"content": blank[n]} if n in blank else {}) for n, value in enumerate(self.values)]
        text = self._rendered(values, self.prompted)
        kept = self.text
        for number, content in blank.items():
            kept = kept.replace(chr(FIRST_MARK + self.firsts[number]), content)
        if kept != text:
            self.values, self.text = values, text

    def layout(self) -> Layout:
        """Return the layout; TemplateRefusal when contents are repeated or change their order."""
        order = [mark for _, mark in self.marks]
        if order != sorted(set(order)):
            raise TemplateRefusal("a content is repeated, or out of its place")
        parts: list[Part] = []
        at, before = 0, -1
        for place, mark in self.marks:
            message = self._message_of(mark)
            parts += self._between(self.text[at:place], before, mark)
            blank = self.shapes[message].blank
            parts.append(Part(message * SLOTS_PER_MESSAGE + TEXT, blank or None, mark - self.firsts[message], True))
            at, before = place + 1, mark
        parts += self._between(self.text[at:], before, None)
        seen = set(order)
        dropped = {self._message_of(mark) for mark in range(self.firsts[-1]) if mark not in seen}
        dropped = {message for message in dropped if not self.shapes[message].blank}
        return Layout(tuple(part for part in parts if part.literal != ""), frozenset(dropped), self._silent())

    def _between(self, literal: str, before: int, after: int | None) -> list[Part]:
        """Return the parts of the text between two marks: of one turn, of turns without a mark, of the next."""
        first = self._message_of(before) if before >= 0 else -1
        last = len(self.messages) if after is None else self._message_of(after)
        if first == last:
            return self._inner(literal, first, before)
        left = self._verbatim(first, -1) if before >= 0 else ""
        right = self._verbatim(last, 0) if after is not None else ""
        bare = self._bare(before, after, left, right)
        left, right = _kept(literal, bare, left, right)
        parts = [Part(first * SLOTS_PER_MESSAGE + TEXT, left, -1, True)] if left else []
        rest, at = literal[len(left) : len(literal) - len(right)], 0
        if first < 0:
            start = self._start(rest)
            parts.append(Part(START_SLOT, rest[:start]))
            at = start
        for message in range(max(first, 0), last):
            ending = self._common(rest, self._tail(message, before, left)) if message < len(self.messages) else at
            ending = max(at, ending)
            if message > first:
                header = self._header_end(rest, message, before, left, ending)
                parts.append(Part(message * SLOTS_PER_MESSAGE + HEADER, rest[at:header]))
                at, ending = max(at, header), len(rest) if header > ending else ending
            parts.append(Part(message * SLOTS_PER_MESSAGE + END, rest[at:ending]))
            at = ending
        parts.append(Part(last * SLOTS_PER_MESSAGE + HEADER, rest[at:]))
        return [*parts, *([Part(last * SLOTS_PER_MESSAGE + TEXT, right, -1, True)] if right else [])]

    def _inner(self, literal: str, message: int, before: int) -> list[Part]:
        """Return the text between two runs of one content: the content's own where it is as it was there."""
        pieces, run = self.shapes[message].pieces, before - self.firsts[message]
        places = [place for place, piece in enumerate(pieces) if piece is None]
        own = "".join(piece or "" for piece in pieces[places[run] + 1 : places[run + 1]])
        return [Part(message * SLOTS_PER_MESSAGE + TEXT, literal, -1, own == literal)]

    def _verbatim(self, message: int, end: int) -> str:
        """Return what stands verbatim at an end (0 or -1) of a message's shape."""
        pieces = self.shapes[message].pieces
        return pieces[end] or "" if pieces else ""

    def _bare(self, before: int, after: int | None, left: str, right: str) -> str | None:
        """Return the text between two marks where the contents have no whitespace there, None if that says nothing."""
        if not (left + right) or (left + right).strip():
            return None
        values = [dict(value) for value in self.values]
        for mark, text in ((before, left), (after, right)):
            if text and mark is not None:
                place = self._message_of(mark)
                content = values[place]["content"]
                bare = content.removesuffix(text) if mark == before else content.removeprefix(text)
                values[place]["content"] = bare
        try:
            text = self._rendered(values, self.prompted)
        except TemplateRefusal:
            return None
        start = text.find(chr(FIRST_MARK + before)) + 1 if before >= 0 else 0
        stop = text.find(chr(FIRST_MARK + after)) if after is not None else len(text)
        return text[start:stop]

    def _tail(self, message: int, before: int, left: str) -> str:
        """Return what follows the mark `before` where the rendering ends with `message`, or one turn more.

        A template may close the last turn of all with more than a turn's end.
        """
        if message < len(self.messages) - 1 or self.prompted:
            values = self.values[: message + 1]
            if message == len(self.messages) - 1:
                return self._after(values, before, left)
        else:
            role = "assistant" if self.messages[-1].role == "user" else "user"
            values = [*self.values, {"role": role, "content": chr(FIRST_MARK + self.firsts[-1])}]
        return self._after(values, before, left).split(chr(FIRST_MARK + self.firsts[-1]))[0]

    def _after(self, values: Sequence[Mapping[str, Any]], before: int, left: str, prompted: bool = False) -> str:
        try:
            text = self._rendered(values, prompted)
        except TemplateRefusal:
            return "" if len(values) <= len(self.messages) else self.text[self._place(before) :].removeprefix(left)
        return text[text.find(chr(FIRST_MARK + before)) + 1 if before >= 0 else 0 :].removeprefix(left)

    def _place(self, mark: int) -> int:
        return next((at + 1 for at, found in self.marks if found == mark), 0)

    def _header_end(self, rest: str, message: int, before: int, left: str, ending: int) -> int:
        """Return where the header ends of a turn without a mark: for an answer, where the template asks for one."""
        if self.messages[message].role != "assistant":
            return ending
        return self._common(rest, self._after(self.values[:message], before, left, prompted=True))

    def _common(self, first: str, second: str) -> int:
        """Return how many characters two texts begin with alike; a special token is an atom."""
        size = len(commonprefix([first, second]))  # noqa: RUF071
        for text in (first, second):
            for special in self.source.specials:
                start = text.find(special, max(0, size - len(special) + 1))
                while 0 <= start < size:
                    if start + len(special) > size:
                        size = start
                        break
                    start = text.find(special, start + 1)
        return size

    def _start(self, text: str) -> int:
        variables = self.source.variables
        start = variables.get("bos_token") or variables.get("eos_token") or ""
        return len(start) if text.startswith(start) else 0

    def _silent(self) -> frozenset[int]:
        """Return messages with tool calls whose functions the rendering does not name."""
        silent = set()
        for number, message in enumerate(self.messages):
            calls = json.loads(message.extra or "{}").get("tool_calls") or []
            names = [str((call.get("function") or call).get("name")) for call in calls if isinstance(call, dict)]
            if any(name not in self.text for name in names):
                silent.add(number)
        return frozenset(silent)

    def _message_of(self, mark: int) -> int:
        return next(n for n, (a, b) in enumerate(zip(self.firsts, self.firsts[1:], strict=False)) if a <= mark < b)

    def _rendered(self, values: Sequence[Mapping[str, Any]], prompted: bool) -> str:
        return render(self.source.template, values, self.options, prompted)


def _is_mark(character: str) -> bool:
    return FIRST_MARK <= ord(character) < FIRST_MARK + 0xFFFD


def _kept(literal: str, bare: str | None, left: str, right: str) -> tuple[str, str]:
    """Return which of the verbatim ends of two neighbouring contents are in the text between them.

    `bare` is that text when both are without their whitespace, None where the ends are more than whitespace.
    """
    if bare is not None:
        for kept in ((left, right), (left, ""), ("", right), ("", "")):
            if kept[0] + bare + kept[1] == literal:
                return kept
        return "", ""
    kept_left = left if literal.startswith(left) else ""
    rest = literal[len(kept_left) :]
    return kept_left, right if rest.endswith(right) else ""


def _fields(template: str, message: Message, content: str, parsed: bool) -> dict[str, Any]:
    """Return a message as the template takes it."""
    fields: dict[str, Any] = {"role": message.role, "content": content} | json.loads(message.extra or "{}")
    reasoned = fields.pop(REASONED, False)
    if parsed:
        for call in fields.get("tool_calls") or []:
            function = call.get("function", call)
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"])
    # Reasoning that a data set has in a field of its own is the beginning of the content here; a template that reads
    # such a field gets it there.
    opened, closed = THINK
    if reasoned and reads_reasoning(template) and closed in content:
        reasoning, _, rest = content.removeprefix(opened).partition(closed)
        fields |= dict.fromkeys(REASONING, reasoning.strip("\n")) | {"content": rest.lstrip("\n")}
    return fields
