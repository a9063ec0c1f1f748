"""Turns in a rendering: what a chat template writes before, for and after each message's content.

Nothing here knows a template. A rendering holds placeholders (`stages.tokenization.shapes`), which say where contents
are. What lies between two contents is the end of one turn and the header of the next: the end is what follows the
content also when its message is the last one, as the template renders the messages up to it.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import Any, NamedTuple

from stages.core.errors import UserError
from stages.tokenization.rendering import PLACEHOLDERS, ChatTemplate, TemplateRefusal

PLAIN_ROLES = ("user", "assistant", "user", "assistant")
FILLERS = 0xFFF0  # from here on, numbers of placeholders for contents that a conversation lacks
_NEXT, _INSTEAD, _AFTER = 4, 5, 6  # of them, behind those of PLAIN_ROLES
CALLS = ("tool_calls", "function_call")
RUN = re.compile("[\U000f0000-\U0010ffff]")


class Turn(NamedTuple):
    """A message of shapes, as the template gets it; `text`: the shape of all its text; its placeholders' numbers."""

    message: dict[str, Any]
    text: str
    first: int
    stop: int


class Cut(NamedTuple):
    """Where a turn is in a rendering: header from `start`, content, end of turn from `content_end` to `end`."""

    start: int
    content: int
    content_end: int
    end: int


class Rendering(NamedTuple):
    """A conversation rendered.

    `opening`: length of the start; `runs`: places of the placeholders that stand in their turn; `refused`: a turn that
    the template takes in no conversation is left out.
    """

    text: str
    opening: int
    cuts: tuple[Cut, ...]
    runs: tuple[int, ...]
    refused: bool = False


class TurnFinder:
    """Renders conversations and finds their turns. `specials` matches the special tokens; `name` is the tokenizer's."""

    def __init__(self, template: ChatTemplate, specials: re.Pattern[str] | None, name: str) -> None:
        self._template, self._specials = template, specials
        self._start = template.variables.get("bos_token") or template.variables.get("eos_token") or ""
        self._ends: list[str] = []
        self._opener = ""  # the special token that turns begin with
        try:
            plain = self._found([_filler(role, number) for number, role in enumerate(PLAIN_ROLES)])
        except TemplateRefusal as error:
            reason = str(error)
        else:
            reason = "the content of a message does not appear" if len(plain.runs) < len(PLAIN_ROLES) else ""
            self._ends = [plain.text[cut.content_end : cut.end] for cut in plain.cuts]
            self._opening = plain.text[: plain.opening]
            first = specials.match(plain.text, plain.cuts[0].start, plain.cuts[0].content) if specials else None
            self._opener = first[0] if first and first[0] != template.variables.get("eos_token") else ""
        if reason:
            raise UserError(
                f"The chat template of tokenizer {name} cannot render a user and an assistant turn: {reason}."
            )

    def find(self, turns: Sequence[Turn], **options: Any) -> Rendering:
        """Return the rendering of a conversation.

        One that the template refuses (a system turn for Gemma 2, two user turns in a row) is put together from what it
        makes of each turn in a conversation that it takes, roles it does not know as user.
        """
        for variant in (turns, [_with_mappings(turn) for turn in turns]):
            try:
                return self._found(variant, **options)
            except TemplateRefusal:
                continue
        return self._composed(turns, **options)

    def renders_calls(self, turns: Sequence[Turn], number: int, text: str) -> bool:
        """Return whether the template makes something of the calls of a turn; `text` is the rendering with them."""
        kept = {key: value for key, value in turns[number].message.items() if key not in CALLS}
        without = [turn._replace(message=kept) if i == number else turn for i, turn in enumerate(turns)]
        return self.find(without).text != text

    def _render(self, turns: Sequence[Turn], **options: Any) -> str:
        return self._template.render([turn.message for turn in turns], placeholders=True, **options)

    def _found(self, turns: Sequence[Turn], **options: Any) -> Rendering:
        text = self._render(turns, **options)
        tails: list[str | None] = []
        for count in range(1, len(turns)):
            tails.append(self._tail(turns[:count], turns[:count], tails))
        if options.get("add_generation_prompt"):
            tails.append(self._tail(turns, turns, tails))
        else:
            roles = ("assistant", "user") if turns[-1].message["role"] == "user" else ("user", "assistant")
            followed = (self._tail([*turns, _filler(role, _NEXT)], turns, tails) for role in roles)
            tails.append(next((tail for tail in followed if tail is not None), None))
        return self._cut(text, turns, tails)

    def _tail(self, rendered: Sequence[Turn], turns: Sequence[Turn], tails: list[str | None]) -> str | None:
        """Return what follows the content of the last of `turns` where `rendered` is rendered, None if it is not."""
        try:
            text = self._render(rendered)
        except TemplateRefusal:
            return None
        spots, _ = _spots(text, rendered)
        last = len(turns) - 1
        if spots[last] is None and turns[last].stop > turns[last].first:
            return None
        if spots[last] is None:
            return text[self._cut(text, rendered, [*tails, *[None] * (len(rendered) - last)]).cuts[last].content_end :]
        return text[spots[last][1] :]

    def _cut(self, text: str, turns: Sequence[Turn], tails: Sequence[str | None]) -> Rendering:
        spots, runs = _spots(text, turns)
        opening = len(self._start) if self._start and text.startswith(self._start) else 0
        cuts: list[Cut] = []
        at = opening
        for i, turn in enumerate(turns):
            following = next((spot[0] for spot in spots[i + 1 :] if spot), len(text))
            if (spot := spots[i]) is None:
                content = min(at + self._header_length(turns, i, text, at), following)
                content_end = content + len(commonprefix([turn.text, text[content:following]]))  # noqa: RUF071
            else:
                content, content_end = spot
                lead = text[content : next(place for place in runs if place >= content)]
                if any(map(turn.message.get, CALLS)):
                    # A template may write them before the content.
                    content = min(content, at + self._header_length(turns, i, text, at))
                elif lead and lead.isspace():
                    # A template may have stripped it, and have written the same itself.
                    content = max(content, min(at + self._header_length(turns, i, text, at), content + len(lead)))
            end = content_end + self._end_length(text[content_end:following], tails[i], i == len(turns) - 1)
            cuts.append(Cut(at, content, content_end, end))
            at = end
        return Rendering(text, opening, tuple(cuts), runs)

    def _end_length(self, rest: str, tail: str | None, last: bool) -> int:
        """Return how much of `rest`, from the end of a content on, is the end of its turn."""
        common = self._common(rest, tail) if tail is not None else 0
        if common or tail == "":
            # A template that always asks for an answer has the start of the next header in both.
            return len(rest[:common].removesuffix(self._opener))
        if last:
            return len(rest)
        return max((len(end) for end in self._ends if rest.startswith(end)), default=0)

    def _header_length(self, turns: Sequence[Turn], number: int, text: str, at: int) -> int:
        """Return the length of a turn's header from `at`: what precedes another content, or an answer to be made."""
        filled = [*turns]
        message = {key: value for key, value in turns[number].message.items() if key not in CALLS}
        filled[number] = _filler(message["role"], _INSTEAD, message)
        trials = [(filled, {})]
        if turns[number].message["role"] == "assistant" and number:
            trials.append((turns[:number], {"add_generation_prompt": True}))
        for trial, options in trials:
            try:
                other = self._render(trial, **options)
            except TemplateRefusal:
                continue
            content = len(other) if options else other.find(filled[number].text)
            if content >= at and other[:at] == text[:at]:
                return self._common(text[at:], other[at:content])
        return 0

    def _common(self, left: str, right: str) -> int:
        """Return the length of the common beginning, in which no special token is cut."""
        length = len(commonprefix([left, right]))  # noqa: RUF071
        for text in (left, right):
            for match in self._specials.finditer(text) if self._specials else ():
                if match.start() >= length:
                    break
                if match.end() > length:
                    length = match.start()
        return length

    def _composed(self, turns: Sequence[Turn], **options: Any) -> Rendering:
        parts, cuts, runs, refused = [self._opening], [], [], False
        at = opening = len(self._opening)
        for i, turn in enumerate(turns):
            text, cut, own = self._alone(turn, i == 0)
            refused |= not text
            shift = at - cut.start
            parts.append(text[cut.start : cut.end])
            cuts.append(Cut(*(place + shift for place in cut)))
            runs += [place + shift for place in own]
            at = cuts[-1].end
        if options.get("add_generation_prompt"):
            with suppress(TemplateRefusal):
                found = self._found([_filler("user", 0)], **options)
                parts.append(found.text[found.cuts[-1].end :])
        return Rendering("".join(parts), opening, tuple(cuts), tuple(runs), refused)

    def _alone(self, turn: Turn, first: bool) -> tuple[str, Cut, list[int]]:
        """Return (rendering, cut, places of its runs) of a turn among others with which the template takes it.

        The rendering is "" where it takes it with none.
        """
        role = turn.message["role"]
        user, answer, ask, reply = (_filler(role, number) for number, role in enumerate(PLAIN_ROLES))
        plain = turn._replace(message={"role": role, "content": turn.text})
        trials: list[tuple[list[Turn], Turn, list[Turn]]] = []
        for variant in (turn, _with_mappings(turn), plain):
            if role == "assistant":
                trials.append(([user, answer, ask], variant, [_filler("user", _AFTER)]))
            elif role != "user":
                trials.append(([], variant, [ask]))
        if role != "assistant":
            asked = plain._replace(message={"role": "user", "content": turn.text})
            trials.append(([] if first else [user, answer], asked, [reply]))
        for before, variant, after in trials:
            conversation = [*before, variant, *after]
            try:
                found = self._found(conversation)
            except TemplateRefusal:
                continue
            cut = found.cuts[len(before)]
            own = [place for place in found.runs if turn.first <= run_of(found.text[place]) < turn.stop]
            if turn.stop == turn.first or own:
                return found.text, cut, own
        return "", Cut(0, 0, 0, 0), []


def _filler(role: str, number: int, message: dict[str, Any] | None = None) -> Turn:
    """Return a turn with a content that is one placeholder; `message`: with the other fields of this one."""
    number += FILLERS
    text = chr(PLACEHOLDERS + number)
    return Turn({**(message or {}), "role": role, "content": text}, text, number, number + 1)


def run_of(character: str) -> int:
    """Return the number of a placeholder, escaped or not."""
    return (ord(character) - PLACEHOLDERS) & 0xFFFF


def _with_mappings(turn: Turn) -> Turn:
    """Return a turn whose calls have arguments as mappings where they are the JSON of one, as some templates want."""
    calls = turn.message.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    return turn._replace(message=turn.message | {"tool_calls": [_mapped(call) for call in calls]})


def _mapped(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": _mapped(inner)}
    try:
        arguments = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError):
        return call
    return call | {"arguments": arguments}


def _spots(text: str, turns: Sequence[Turn]) -> tuple[list[tuple[int, int] | None], tuple[int, ...]]:
    """Return (the content of each turn as (start, end), None where it has no placeholder; places of placeholders).

    A template may put contents elsewhere (a system prompt before the last question) or repeat them: what stands in its
    turn is a longest run of placeholders in their order, all others are the template's.
    """
    order = {run: i for i, run in enumerate(run for turn in turns for run in range(turn.first, turn.stop))}
    found = [(match.start(), run_of(match[0])) for match in RUN.finditer(text)]
    found = [(place, run) for place, run in found if run in order]
    chosen = [found[i] for i in _increasing([order[run] for _, run in found])]
    spots: list[tuple[int, int] | None] = []
    lower = 0
    for turn in turns:
        own = [(place, run - turn.first) for place, run in chosen if turn.first <= run < turn.stop]
        if not own:
            spots.append(None)
            continue
        (first, run), (last, last_run) = own[0], own[-1]
        verbatim = RUN.split(turn.text)
        before, after = verbatim[run], verbatim[last_run + 1]
        lead = len(commonprefix([before[::-1], text[lower:first][::-1]]))  # noqa: RUF071
        trail = len(commonprefix([after, text[last + 1 :]]))  # noqa: RUF071
        spots.append((first - lead, last + 1 + trail))
        lower = last + 1 + trail
    return spots, tuple(place for place, _ in chosen)


def _increasing(values: Sequence[int]) -> list[int]:
    """Return the places of a longest strictly increasing run of `values`."""
    lowest: list[int] = []  # the lowest last value of a run of each length
    places: list[int] = []
    before: list[int] = []
    for place, value in enumerate(values):
        length = bisect_left(lowest, value)
        before.append(places[length - 1] if length else -1)
        lowest[length : length + 1] = [value]
        places[length : length + 1] = [place]
    at, chosen = places[-1] if places else -1, []
    while at >= 0:
        chosen.append(at)
        at = before[at]
    return chosen[::-1]
