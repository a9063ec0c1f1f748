"""A tokenizer's chat template: the layouts of conversations, also of those that it refuses."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.errors import UserError
from stages.tokenization.layout import (
    END,
    HEADER,
    SLOTS_PER_MESSAGE,
    START_SLOT,
    TEXT,
    Layout,
    Part,
    Rendered,
    Source,
)
from stages.tokenization.rendering import THINK, Message, Shape, TemplateRefusal, shape_of

LOG = logging.getLogger(__name__)
PLAIN_ROLES = ("user", "assistant", "user", "assistant")
ANYTHING = "x"


class Template:
    """A Jinja chat template with its variables; `specials` are the written forms of special tokens, atoms of its text.

    `name` names the tokenizer in errors.
    """

    def __init__(self, template: str, variables: Mapping[str, str], specials: Sequence[str], name: str) -> None:
        self.source, self.name = Source(template, dict(variables), tuple(specials)), name
        self._layouts: dict[Any, Layout] = {}
        self._said: set[tuple[str, str]] = set()

    def shape(self, text: str) -> Shape:
        """Return what the template sees of a content."""
        return shape_of(self.source.template, text)

    def layout(
        self, messages: Sequence[Message], shapes: Sequence[Shape], prompted: bool = False, thinking: bool | None = None
    ) -> Layout:
        """Return the layout of messages with these shapes, cached; `prompted`: and with the beginning of an answer.

        `thinking` is the variable enable_thinking, None leaves it undefined. A conversation that the template refuses
        (a system turn for Gemma 2, two user turns in a row) is put together from the pieces of one that it takes,
        roles it does not know as user. UserError when it takes no user and assistant turn.
        """
        said = tuple((m.role, s.pieces, s.blank, m.extra) for m, s in zip(messages, shapes, strict=True))
        key = said, prompted, thinking
        if key not in self._layouts:
            self._layouts[key] = self._find(messages, shapes, prompted, thinking)
            self._say(messages, self._layouts[key])
        return self._layouts[key]

    def _say(self, messages: Sequence[Message], layout: Layout) -> None:
        """Log, once for each role, that turns are left out in part."""
        for number in sorted(layout.dropped | layout.silent):
            what = "a part of the text" if number in layout.dropped else "the tool calls"
            role = messages[number].role
            if (role, what) not in self._said:
                self._said.add((role, what))
                LOG.info(
                    "The chat template of %s leaves out %s of some %s turns: not trained on.", self.name, what, role
                )

    def plain(self) -> Layout:
        """Return the layout of two rounds of user and assistant; UserError when the template cannot render them."""
        if PLAIN_ROLES not in self._layouts:
            try:
                self._layouts[PLAIN_ROLES] = self.of_roles(PLAIN_ROLES)
            except TemplateRefusal as error:
                raise UserError(
                    f"The chat template of tokenizer {self.name} cannot render a user and an assistant turn: {error}."
                ) from None
        return self._layouts[PLAIN_ROLES]

    def of_roles(self, roles: Sequence[str]) -> Layout:
        """Return the layout of messages of these roles with any text; TemplateRefusal when one does not appear."""
        messages = [Message(role, ANYTHING) for role in roles]
        found = Rendered(self.source, messages, [self.shape(ANYTHING)] * len(roles), False, None).layout()
        if found.dropped:
            place = f"message {min(found.dropped) + 1} of {len(roles)}"
            raise TemplateRefusal(f"{place} does not appear exactly once in its place")
        return found

    def leads(self, messages: Sequence[Message], thinking: bool | None) -> tuple[str, str]:
        """Return (template text before an answer that the model has to write, beginning of an answer that it is given).

        Where the template opens a block of reasoning for the model, that is the beginning of its answer.
        """
        said = [*messages, Message("assistant", ANYTHING)]
        asked = self.layout(messages, [self.shape(m.text) for m in messages], True, thinking)
        prompt = asked.text_of(len(messages) * SLOTS_PER_MESSAGE + HEADER)
        opened, closed = THINK
        if opened in prompt and closed not in prompt[prompt.rindex(opened) :]:
            return "", prompt[prompt.rindex(opened) :]
        answered = self.layout(said, [self.shape(m.text) for m in said])
        header = answered.text_of(len(messages) * SLOTS_PER_MESSAGE + HEADER)
        return header.removeprefix(prompt) if header.startswith(prompt) else "", ""

    def _find(
        self, messages: Sequence[Message], shapes: Sequence[Shape], prompted: bool, thinking: bool | None
    ) -> Layout:
        for parsed in (False, True) if any(message.extra for message in messages) else (False,):
            try:
                return Rendered(self.source, messages, shapes, prompted, thinking, parsed).layout()
            except TemplateRefusal:
                continue
        return self._composed(messages, shapes, prompted)

    def _composed(self, messages: Sequence[Message], shapes: Sequence[Shape], prompted: bool) -> Layout:
        plain = self.plain()
        parts = [part for part in plain.parts if part.slot == START_SLOT]
        for number, (message, shape) in enumerate(zip(messages, shapes, strict=True)):
            header, end = self._turn(message.role, number == 0)
            parts.append(Part(number * SLOTS_PER_MESSAGE + HEADER, header))
            runs = iter(range(len(shape.runs)))
            parts += [
                Part(number * SLOTS_PER_MESSAGE + TEXT, piece, -1 if piece is not None else next(runs), True)
                for piece in shape.pieces
            ]
            parts.append(Part(number * SLOTS_PER_MESSAGE + END, end))
        last = len(messages) * SLOTS_PER_MESSAGE
        after = self._turn("assistant", not messages)[0] if prompted else plain.text_of(len(PLAIN_ROLES) * 3 + 1)
        parts.append(Part(last + 1, after))
        return Layout(tuple(part for part in parts if part.literal != ""))

    def _turn(self, role: str, first: bool) -> tuple[str, str]:
        """Return (header, end) of a turn as it is among others, or at the beginning."""
        plain, at = self.plain(), {"user": 0 if first else 2, "assistant": 1 if first else 3}
        if role not in at:
            try:
                found = self.of_roles((role, "user"))
                return found.text_of(HEADER), found.text_of(END)
            except TemplateRefusal:
                pass
        place = at.get(role, 0 if first else 2) * SLOTS_PER_MESSAGE
        return plain.text_of(place + HEADER), plain.text_of(place + END)
